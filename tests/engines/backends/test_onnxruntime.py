"""ONNX Runtime on the CPU: loops are their steps, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.backends.onnxruntime.engine import OnnxRuntimeEngine, check_version
from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import BackendError
from engines.options import EngineOptions
from export.example_inputs import example_inputs
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ID_ENCODER

SIZES = {"samples": 1, "rows": 2, "conditions": 2, "maps": 2}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle)


def test_a_loop_is_its_steps(bundle: Bundle, engine: OnnxRuntimeEngine) -> None:
    """Three steps of a method that needs what the step before predicted."""
    inputs = example_inputs(bundle.manifest.specs[DENOISE], SIZES)
    timesteps = np.array([[900], [500], [100]], np.float32)
    given = dict(inputs)
    for timestep in timesteps:
        results = engine.run(DENOISE, given | {"timestep": timestep})
        given |= {"latent": results["next_latent"], "carry": results["epsilon"]}
    found = engine.run_steps(
        DENOISE, inputs, {"timestep": timesteps}, {"latent": "next_latent", "carry": "epsilon"}
    )
    for name, expected in results.items():
        np.testing.assert_array_equal(engine.to_host(found[name]), engine.to_host(expected))


def test_steps_must_be_as_many_for_every_input(bundle: Bundle, engine: OnnxRuntimeEngine) -> None:
    inputs = example_inputs(bundle.manifest.specs[DENOISE], SIZES)
    per_step = {
        name: np.stack([inputs[name]] * count) for name, count in (("timestep", 2), ("guidance_scale", 3))
    }
    with pytest.raises(ValueError, match=r"one number of steps, not for \[2, 3\]"):
        engine.run_steps(DENOISE, inputs, per_step, {})


@pytest.mark.parametrize("version", ["1.20.1", "1.22.1", "0.9"])
def test_a_library_without_what_is_needed_is_refused(version: str) -> None:
    with pytest.raises(BackendError, match=f"ONNX Runtime {version} is too old, it must be 1.23 or later"):
        check_version(version)
    check_version("1.23.0")
    check_version("2.0.0rc1")


def test_nothing_is_reported_to_its_makers(bundle: Bundle, tmp_path: Path) -> None:
    """What reports leaves a number for this machine, and what it has not sent yet."""
    code = (
        "import sys; from engines.backends.onnxruntime.engine import load_library;"
        "load_library().InferenceSession(sys.argv[1])"
    )
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(tmp_path))
    ours = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", code, str(bundle.graph_file(DENOISE, "cpu"))]
    subprocess.run(command, check=True, env={**ours, **places, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "openvino"])
def test_graphs_for_cards_are_not_run_on_the_cpu(bundle: Bundle, backend: str) -> None:
    for_cards = Bundle(bundle.path, replace(bundle.manifest, target="cuda"))
    command = r"anydoor build CHECKPOINT --backend onnxruntime --targets any"
    with pytest.raises(BackendError, match=f"is for NVIDIA cards .*: build one for the CPU with '{command}'"):
        open_engine(for_cards, EngineOptions(backend, "cpu"))


def test_graphs_of_sampling_hold_no_buffers(engine: OnnxRuntimeEngine) -> None:
    """Results that nobody needs any more are freed at once, where that is less memory."""
    for graph in (DENOISE, CONTROL, DECODE, ID_ENCODER):
        engine.load(graph)
    held = {graph: s.get_session_options().enable_mem_reuse for graph, s in engine._sessions.items()}
    assert held == {DENOISE: False, CONTROL: False, DECODE: True, ID_ENCODER: True}


def test_the_cpu_has_no_tf32(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="tf32 needs a card"):
        open_engine(bundle, EngineOptions("onnxruntime", "cpu", "tf32"))
    with pytest.raises(BackendError, match="only the backend onnxruntime has the inference precision tf32"):
        open_engine(bundle, EngineOptions("openvino", "cpu", "tf32"))


def test_what_is_fetched_outlives_the_tensor(engine: OnnxRuntimeEngine) -> None:
    """Tensors on the CPU point into the array that they were made of, which goes when they go."""
    fetched = [engine.to_host(engine.to_device(np.full(1 << 18, number, np.float32))) for number in range(4)]
    for number, array in enumerate(fetched):
        np.testing.assert_array_equal(array, np.full(1 << 18, number, np.float32))

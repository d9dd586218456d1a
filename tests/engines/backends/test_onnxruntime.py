"""ONNX Runtime: what a CUDA graph needs, as far as it shows without a card.

A captured call reads and writes the same memory every time. That is run here on the CPU, where nothing is
captured; the rest of the way is the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.backends.onnxruntime.engine import MOST_CAPTURED, FixedCall, OnnxRuntimeEngine, provider_options
from engines.bundle import Bundle
from engines.options import EngineOptions
from export.example_inputs import example_inputs
from tests.support.anydoor import CONTROL, DENOISE

SIZES = {"samples": 1, "rows": 2, "conditions": 2, "maps": 2}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def plain(bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle, "cpu")


@pytest.fixture
def fixed(bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle, "cpu", EngineOptions(cuda_graphs=True))


def test_options_of_the_providers() -> None:
    assert provider_options("cpu", 6_000_000_000, cuda_graphs=True) == {}
    assert provider_options("cuda") == {"arena_extend_strategy": "kSameAsRequested"}
    assert provider_options("cuda", 6_000_000_000, cuda_graphs=True) == {
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": "6000000000",
        "enable_cuda_graph": "1",
    }


def test_steps_at_fixed_places_compute_the_same(
    bundle: Bundle, plain: OnnxRuntimeEngine, fixed: OnnxRuntimeEngine
) -> None:
    """Three steps, each from the latent of the one before, with tensors and arrays as inputs."""
    inputs = example_inputs(bundle.manifest.specs[DENOISE], SIZES)
    latents = []
    for engine in (plain, fixed):
        given = inputs | {"tokens": engine.to_device(inputs["tokens"])}
        for timestep in (900, 500, 100):
            given["timestep"] = np.array([timestep], np.float32)
            given["latent"] = engine.run(DENOISE, given, ["next_latent"])["next_latent"]
        latents.append(engine.to_host(given["latent"]))
    np.testing.assert_array_equal(*latents)


def test_a_loop_is_its_steps(bundle: Bundle, plain: OnnxRuntimeEngine, fixed: OnnxRuntimeEngine) -> None:
    """Three steps of a method that needs what the step before predicted."""
    inputs = example_inputs(bundle.manifest.specs[DENOISE], SIZES)
    timesteps = np.array([[900], [500], [100]], np.float32)
    given = dict(inputs)
    for timestep in timesteps:
        results = plain.run(DENOISE, given | {"timestep": timestep})
        given |= {"latent": results["next_latent"], "carry": results["epsilon"]}
    for engine in (plain, fixed):
        found = engine.run_steps(
            DENOISE, inputs, {"timestep": timesteps}, {"latent": "next_latent", "carry": "epsilon"}
        )
        for name, expected in results.items():
            np.testing.assert_array_equal(engine.to_host(found[name]), plain.to_host(expected))


def test_steps_must_be_as_many_for_every_input(bundle: Bundle, plain: OnnxRuntimeEngine) -> None:
    inputs = example_inputs(bundle.manifest.specs[DENOISE], SIZES)
    per_step = {
        name: np.stack([inputs[name]] * count) for name, count in (("timestep", 2), ("guidance_scale", 3))
    }
    with pytest.raises(ValueError, match=r"one number of steps, not for \[2, 3\]"):
        plain.run_steps(DENOISE, inputs, per_step, {})


def test_a_result_survives_the_next_call_at_its_place(bundle: Bundle, fixed: OnnxRuntimeEngine) -> None:
    inputs = example_inputs(bundle.manifest.specs[DENOISE], SIZES)
    result = fixed.run(DENOISE, inputs)["epsilon"]
    before = fixed.to_host(result).copy()
    fixed.run(DENOISE, inputs | {"latent": inputs["latent"] + 1})
    np.testing.assert_array_equal(fixed.to_host(result), before)


def test_every_set_of_shapes_has_places_of_its_own(
    bundle: Bundle, plain: OnnxRuntimeEngine, fixed: OnnxRuntimeEngine
) -> None:
    spec = bundle.manifest.specs[DENOISE]
    for samples in (1, 2, 1):
        inputs = example_inputs(spec, SIZES | {"samples": samples}, seed=samples)
        expected = plain.to_host(plain.run(DENOISE, inputs)["next_latent"])
        np.testing.assert_array_equal(fixed.to_host(fixed.run(DENOISE, inputs)["next_latent"]), expected)
    assert len(fixed._fixed_calls) == 2


def test_only_so_many_sets_of_shapes_are_captured(bundle: Bundle, fixed: OnnxRuntimeEngine) -> None:
    spec = bundle.manifest.specs[DENOISE]
    for maps in range(1, MOST_CAPTURED + 3):
        fixed.run(DENOISE, example_inputs(spec, SIZES | {"rows": 1, "maps": maps}))
    assert len(fixed._fixed_calls) == MOST_CAPTURED


def test_a_call_says_which_capture_it_is(bundle: Bundle, plain: OnnxRuntimeEngine) -> None:
    plain.load(DENOISE)
    spec = bundle.manifest.specs[DENOISE]
    shapes = {tensor.name: tensor.resolve(SIZES) for tensor in spec.inputs}
    call = FixedCall(plain._sessions[DENOISE], spec, shapes, "cpu", 3)
    assert call._options.get_run_config_entry("gpu_graph_id") == "3"


def test_places_go_with_the_graph(bundle: Bundle, fixed: OnnxRuntimeEngine) -> None:
    fixed.run(DENOISE, example_inputs(bundle.manifest.specs[DENOISE], SIZES))
    fixed.unload(DENOISE)
    assert not fixed._fixed_calls


def test_other_graphs_are_not_captured(bundle: Bundle, fixed: OnnxRuntimeEngine) -> None:
    fixed.run(CONTROL, example_inputs(bundle.manifest.specs[CONTROL], SIZES))
    assert not fixed._fixed_calls

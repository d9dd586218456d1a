"""An engine's observer wraps every load and every run, and may raise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.engine import Engine, open_engine
from engines.memory_plan import groupings
from engines.options import EngineOptions
from export.example_inputs import example_inputs
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ID_ENCODER
from tests.support.observers import RunCounter

SIZES = {"samples": 1, "rows": 1, "conditions": 1, "maps": 1}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(params=["onnxruntime", "openvino"])
def engine(bundle: Bundle, request: pytest.FixtureRequest) -> Engine:
    pytest.importorskip(request.param)
    return open_engine(bundle, EngineOptions(backend=request.param, device="cpu"))


class Recorder:
    """Keeps what an observer hears, and when each action ended."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []
        self.inputs: dict[str, Mapping[str, Any]] = {}
        self.fails: tuple[str, str] | None = None
        """An action and a graph to raise an error at."""

    @contextmanager
    def __call__(self, action: str, graph: str, inputs: Mapping[str, Any]) -> Iterator[None]:
        self.heard.append((action, graph))
        self.inputs[action] = inputs
        if self.fails == (action, graph):
            raise RuntimeError("the device caught fire")
        yield
        self.heard.append((f"end of {action}", graph))


def inputs_of(bundle: Bundle, graph: str) -> dict[str, Any]:
    return example_inputs(bundle.manifest.specs[graph], SIZES)


def test_a_graph_is_loaded_once_and_run_every_time(bundle: Bundle, engine: Engine) -> None:
    engine.observer = recorder = Recorder()
    inputs = inputs_of(bundle, DECODE)
    engine.run(DECODE, inputs)
    engine.run(DECODE, inputs)
    load, run = [("load", DECODE), ("end of load", DECODE)], [("run", DECODE), ("end of run", DECODE)]
    assert recorder.heard == [*load, *run, *run]
    assert recorder.inputs["load"] == {}
    assert recorder.inputs["run"].keys() == inputs.keys()
    assert recorder.inputs["run"]["latent"] is inputs["latent"]


def test_a_graph_that_was_unloaded_is_loaded_again(bundle: Bundle, engine: Engine) -> None:
    engine.observer = counter = RunCounter()
    for _ in range(2):
        engine.load(DECODE)
        engine.load(DECODE)
        engine.unload(DECODE)
    assert counter.loads == {DECODE: 2}
    assert counter.runs == {}


def test_swapping_groups_is_heard(bundle: Bundle, engine: Any) -> None:
    engine.plan = replace(engine.plan, groups=groupings(bundle.manifest.specs)[-1])
    engine.observer = counter = RunCounter()
    for graph in (ID_ENCODER, CONTROL, DENOISE, CONTROL, ID_ENCODER, DECODE):
        engine.run(graph, inputs_of(bundle, graph))
    assert counter.loads == {ID_ENCODER: 2, CONTROL: 1, DENOISE: 1, DECODE: 1}
    assert counter.runs == {ID_ENCODER: 2, CONTROL: 2, DENOISE: 1, DECODE: 1}


def test_every_step_of_a_loop_is_a_run(bundle: Bundle, engine: Engine) -> None:
    engine.observer = recorder = Recorder()
    timesteps = np.array([[900], [500], [100]], np.float32)
    inputs = inputs_of(bundle, DENOISE)
    engine.run_steps(DENOISE, inputs, {"timestep": timesteps}, {"latent": "next_latent"})
    assert recorder.heard.count(("run", DENOISE)) == recorder.heard.count(("end of run", DENOISE)) == 3
    assert recorder.inputs["run"]["timestep"].tolist() == [100]


def test_rows_and_samples_are_counted(bundle: Bundle, engine: Engine) -> None:
    engine.observer = counter = RunCounter()
    sizes = {"samples": 2, "rows": 3, "conditions": 1, "maps": 4}
    for graph in (CONTROL, DENOISE):
        engine.run(graph, example_inputs(bundle.manifest.specs[graph], sizes))
    assert counter.rows == {CONTROL: [4], DENOISE: [3]}
    assert counter.samples == [2]
    counter.clear()
    assert not counter.runs
    assert not counter.rows


@pytest.mark.parametrize("action", ["load", "run"])
def test_an_error_of_the_observer_is_that_of_the_call(bundle: Bundle, engine: Engine, action: str) -> None:
    """And the engine works as before when it is over."""
    expected = engine.to_host(engine.run(DECODE, inputs_of(bundle, DECODE), ["image"])["image"])
    engine.unload(DECODE)
    engine.observer = recorder = Recorder()
    recorder.fails = (action, DECODE)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the device caught fire"):
            engine.run(DECODE, inputs_of(bundle, DECODE))
    engine.observer = None
    found = engine.to_host(engine.run(DECODE, inputs_of(bundle, DECODE), ["image"])["image"])
    np.testing.assert_array_equal(found, expected)


def test_observing_changes_no_result(bundle: Bundle, engine: Engine) -> None:
    inputs = inputs_of(bundle, DENOISE)
    plain = engine.run(DENOISE, inputs)
    engine.observer = Recorder()
    for name, tensor in engine.run(DENOISE, inputs).items():
        np.testing.assert_array_equal(engine.to_host(tensor), engine.to_host(plain[name]))

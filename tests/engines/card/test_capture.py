"""Captured calls and loops of the card engine, on a simulated card with plans. Not CUDA, and not TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.card.engine import CardEngine
from engines.cuda import OutOfDeviceMemoryError
from engines.engine import Engine
from engines.spec import GraphSpec
from export.example_inputs import example_inputs
from tests.support.anydoor import CONTROL, DENOISE
from tests.support.simulated_engine import Simulation, fill, on_onnxruntime, renamed


def test_steps_windows_and_decoding_are_captured_once_and_replayed(bundle: Bundle) -> None:
    """Four steps with a window each, and three samples to decode; a re-roll needs no windows."""
    simulation = Simulation(bundle)
    simulation.painter.paint()
    assert (simulation.device.captures, simulation.device.launches) == (3, 3 + 3 + 2)
    simulation.painter.paint(seed=50)
    assert (simulation.device.captures, simulation.device.launches) == (3, 8 + 4 + 3)


def test_without_capture_the_pictures_are_the_same(bundle: Bundle) -> None:
    captured, plain = Simulation(bundle), Simulation(bundle, capture=False)
    for seed in (3, 50):
        np.testing.assert_array_equal(captured.painter.paint(seed), plain.painter.paint(seed))
    assert (plain.device.captures, plain.device.launches) == (0, 0)


def loop(
    bundle: Bundle, engine: Engine, steps: int, samples: int = 1, seed: int = 0
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Inputs of a loop over the denoise graph: those that stay the same, and those of every step."""
    spec = bundle.manifest.specs[DENOISE]
    sizes = {"samples": samples, "rows": 2 * samples, "conditions": 2, "maps": 2}
    of_steps = [example_inputs(spec, sizes, seed + step) for step in range(steps)]
    per_step = {name: np.stack([inputs[name] for inputs in of_steps]) for name in spec.per_step}
    inputs = {name: engine.to_device(a) for name, a in of_steps[0].items() if name not in spec.per_step}
    return inputs, per_step


FEEDBACK = {"latent": "next_latent"}
MULTISTEP_FEEDBACK = {"latent": "next_latent", "carry": "epsilon"}


@pytest.mark.parametrize("feedback", [FEEDBACK, MULTISTEP_FEEDBACK], ids=["latent", "latent and epsilon"])
def test_a_loop_computes_the_same_as_its_steps(bundle: Bundle, feedback: dict[str, str]) -> None:
    simulation = Simulation(bundle)
    engines: tuple[Engine, ...] = (on_onnxruntime(bundle), simulation.engine)
    for seed in range(4):
        of_engines = [loop(bundle, engine, 3, seed=10 * seed) for engine in engines]
        expected, found = (
            engine.to_host(engine.run_steps(DENOISE, *inputs, feedback)["next_latent"])
            for engine, inputs in zip(engines, of_engines)
        )
        np.testing.assert_array_equal(found, expected)
    # uncaptured at first, then one launch for all three steps
    assert (simulation.device.captures, simulation.device.launches) == (1, 3)


def test_pictures_whose_steps_nothing_comes_in_between_are_made_in_one_launch(bundle: Bundle) -> None:
    """Loops that were captured, and some that were not yet, against every step for itself."""
    simulation = Simulation(bundle, window=4)
    for seed in (1, 2, 3):
        expected, found = (
            simulation.painter.paint(seed, samples=2, multistep=True, at_once=at_once)
            for at_once in (False, True)
        )
        np.testing.assert_array_equal(found, expected)
    launches = simulation.device.launches
    simulation.painter.paint(4, samples=2, multistep=True, at_once=True)
    # each of the two samples is decoded in one of its own
    assert simulation.device.launches == launches + 1 + 2


@pytest.mark.parametrize("on_device", [False, True])
def test_loops_and_single_steps_may_alternate(bundle: Bundle, on_device: bool) -> None:
    """Each finds at the places what it needs, whatever the other left there."""
    engine = Simulation(bundle).engine
    inputs, per_step = loop(bundle, engine, 2)
    numbers = {name: values[1] for name, values in per_step.items()}
    step = inputs | {name: engine.to_device(n) if on_device else n for name, n in numbers.items()}
    # the last step has other numbers, and leaves them at the places
    per_step = {name: values[::-1] for name, values in per_step.items()}
    expected = [
        engine.to_host(result["next_latent"])
        for result in (engine.run_steps(DENOISE, inputs, per_step, FEEDBACK), engine.run(DENOISE, step))
    ]
    for _ in range(3):
        found = [
            engine.to_host(result["next_latent"])
            for result in (engine.run_steps(DENOISE, inputs, per_step, FEEDBACK), engine.run(DENOISE, step))
        ]
        np.testing.assert_array_equal(found, expected)


def test_a_loop_without_room_for_its_results_leaves_nothing_to_the_next(bundle: Bundle) -> None:
    """Its steps have run by then, and left their latents in place."""
    engine = Simulation(bundle).engine
    inputs, per_step = loop(bundle, engine, 3)
    expected = engine.to_host(engine.run_steps(DENOISE, inputs, per_step, FEEDBACK)["next_latent"])
    kept = fill(engine)
    with pytest.raises(OutOfDeviceMemoryError):
        engine.run_steps(DENOISE, inputs, per_step, FEEDBACK)
    kept.clear()
    found = engine.to_host(engine.run_steps(DENOISE, inputs, per_step, FEEDBACK)["next_latent"])
    np.testing.assert_array_equal(found, expected)


def test_a_call_that_cannot_be_captured_runs_without(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulation, plain = Simulation(bundle), Simulation(bundle, capture=False)

    def capture(work: Callable[[], None]) -> NoReturn:
        record(work)
        raise OutOfDeviceMemoryError("no room for a CUDA graph")

    record = simulation.device.capture
    monkeypatch.setattr(simulation.device, "capture", capture)
    for seed in (3, 50):
        np.testing.assert_array_equal(simulation.painter.paint(seed), plain.painter.paint(seed))
    # once for the steps, the windows and the decoder
    assert caplog.messages == ["a call runs without a CUDA graph: no room for a CUDA graph"] * 3
    assert simulation.device.launches == 0


def test_a_loop_is_captured_for_its_shapes_and_steps(bundle: Bundle) -> None:
    simulation = Simulation(bundle)
    engine, device = simulation.engine, simulation.device
    kinds = [(steps, samples) for steps in (2, 3) for samples in (1, 2)]
    for steps, samples in kinds * 2:
        engine.run_steps(DENOISE, *loop(bundle, engine, steps, samples), FEEDBACK)
    assert device.captures == len(kinds)
    for steps, samples in kinds:
        launches = device.launches
        engine.run_steps(DENOISE, *loop(bundle, engine, steps, samples, seed=9), FEEDBACK)
        assert device.launches == launches + 1
    assert device.captures == len(kinds)


def test_steps_without_room_in_the_tables_go_one_by_one(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.card.engine.MOST_STEPS", 3)
    simulation = Simulation(bundle)
    engine, device = simulation.engine, simulation.device
    for _ in range(3):
        launches = device.launches
        engine.run_steps(DENOISE, *loop(bundle, engine, 4), FEEDBACK)
    assert (device.captures, device.launches) == (1, launches + 4)


def test_loops_do_not_pile_up(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.card.capture.MOST_CALLS", 3)
    simulation = Simulation(bundle)
    engine = simulation.engine
    for steps in (2, 3, 4, 5, 2):
        inputs, per_step = loop(bundle, engine, steps)
        results = [engine.run_steps(DENOISE, inputs, per_step, FEEDBACK) for _ in range(2)]
        np.testing.assert_array_equal(*(engine.to_host(result["next_latent"]) for result in results))
    assert engine.cached_calls == 3


def test_a_loop_is_evicted_with_its_graph(bundle: Bundle) -> None:
    engine = Simulation(bundle).engine
    inputs, per_step = loop(bundle, engine, 2)
    expected = engine.to_host(engine.run_steps(DENOISE, inputs, per_step, FEEDBACK)["next_latent"])
    engine.unload(DENOISE)
    assert engine.cached_calls == 0
    found = engine.to_host(engine.run_steps(DENOISE, inputs, per_step, FEEDBACK)["next_latent"])
    np.testing.assert_array_equal(found, expected)


def windows(bundle: Bundle, maps: int) -> dict[str, Any]:
    """Inputs of the window graph for so many detail maps: each number has a captured call of its own."""
    return {
        of.name: np.ones(of.resolve({"maps": maps}), of.dtype) for of in bundle.manifest.specs[CONTROL].inputs
    }


def test_many_shapes_do_not_pile_up(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.card.capture.MOST_CALLS", 3)
    simulation = Simulation(bundle)
    engine, device = simulation.engine, simulation.device
    most = bundle.manifest.largest_sizes["maps"]
    for maps in range(1, 1 + most):
        for _ in range(2):
            engine.run(CONTROL, windows(bundle, maps))
    assert device.captures == most
    assert engine.cached_calls == device.kept_graphs == 3
    engine.unload(CONTROL)
    assert engine.cached_calls == device.kept_graphs == 0


def test_the_call_that_was_made_longest_ago_makes_room(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.card.capture.MOST_CALLS", 3)
    simulation = Simulation(bundle)
    for maps in (1, 2, 3, 1, 4):
        simulation.engine.run(CONTROL, windows(bundle, maps))
    contexts = simulation.plans.contexts
    for maps, more in ((1, 0), (3, 0), (4, 0), (2, 1)):
        simulation.engine.run(CONTROL, windows(bundle, maps))
        assert simulation.plans.contexts == contexts + more


def test_a_call_is_finished_before_it_makes_room(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is still at its CUDA graph when another shape comes."""
    monkeypatch.setattr("engines.card.capture.MOST_CALLS", 1)

    def third(engine: CardEngine) -> dict[str, NDArray[Any]]:
        given = [windows(bundle, 1), windows(bundle, 1), windows(bundle, 1), windows(bundle, 2)]
        given[2]["hint"] *= 2
        on_card = [{name: engine.to_device(array) for name, array in each.items()} for each in given]
        results = [engine.run(CONTROL, inputs) for inputs in on_card]
        return {name: engine.to_host(tensor) for name, tensor in results[2].items()}

    replayed, plain = third(Simulation(bundle).engine), third(Simulation(bundle, capture=False).engine)
    for name, expected in plain.items():
        np.testing.assert_array_equal(replayed[name], expected)


@pytest.mark.parametrize("samples", [4, 16])
def test_what_is_warmed_up_is_kept(bundle: Bundle, samples: int) -> None:
    """Also when requests of other shapes came: here some samples of a batch are guided, and some not."""
    simulation = Simulation(Bundle(bundle.path, replace(bundle.manifest, max_batch=samples)))
    engine, specs = simulation.engine, bundle.manifest.specs
    calls = [(name, 1, 1) for name in specs if name != DENOISE]
    calls += [(DENOISE, count, rows) for count in range(1, samples + 1) for rows in (count, 2 * count)]
    for _ in engine.warm_up(samples, window=1):
        pass
    for count in range(2, min(samples, 4) + 1):
        for rows in range(count + 1, 2 * count):
            run(engine, specs[DENOISE], count, rows)
    contexts, captures = simulation.plans.contexts, simulation.device.captures
    for name, count, rows in calls:
        run(engine, specs[name], count, rows)
    assert (simulation.plans.contexts, simulation.device.captures) == (contexts, captures)


def run(engine: Engine, spec: GraphSpec, samples: int, rows: int) -> None:
    sizes = {"samples": samples, "rows": rows, "conditions": 2, "maps": 2}
    engine.run(spec.name, {of.name: np.zeros(of.resolve(sizes), of.dtype) for of in spec.inputs})


def test_a_loop_over_a_plan_with_other_names(bundle: Bundle) -> None:
    engine, ours = on_onnxruntime(bundle), Simulation(renamed(bundle)).engine
    inputs, per_step = loop(bundle, engine, 3)
    expected = engine.to_host(engine.run_steps(DENOISE, inputs, per_step, FEEDBACK)["next_latent"])
    inputs, per_step = loop(bundle, ours, 3)
    for _ in range(3):
        results = ours.run_steps(
            DENOISE,
            {f"our {name}": tensor for name, tensor in inputs.items()},
            {f"our {name}": values for name, values in per_step.items()},
            {"our latent": "our next_latent"},
        )
        np.testing.assert_array_equal(ours.to_host(results["our next_latent"]), expected)


def test_an_observer_is_told_of_every_load_and_run(bundle: Bundle) -> None:
    """Several steps at once are one run."""
    engine = Simulation(bundle).engine
    inputs, per_step = loop(bundle, engine, 2)
    seen: list[tuple[str, str, Sequence[int]]] = []

    def observe(action: str, graph: str, given: Mapping[str, Any]) -> AbstractContextManager[object]:
        seen.append((action, graph, given["timestep"].shape if given else ()))
        return nullcontext()

    engine.observer = observe
    for _ in range(2):
        engine.run_steps(DENOISE, inputs, per_step, FEEDBACK)
    assert seen == [("load", DENOISE, ()), *[("run", DENOISE, (2, 1))] * 2]

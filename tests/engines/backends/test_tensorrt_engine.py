"""The TensorRT engine on a simulated card: places, staging, capture, groups. Not CUDA, and not TensorRT."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.backends.tensorrt.engine import Staging, TensorRTEngine
from engines.bundle import Bundle
from engines.cuda import OutOfDeviceMemoryError
from engines.engine import Engine, open_engine
from engines.errors import BackendError
from engines.memory_plan import GraphMemory, ResidencyPlan, plan_residency
from engines.spec import GRAPHS, STEP_INPUTS, largest_sizes
from export.systems.anydoor import example_inputs
from runtime import Compositor, Placement, Sampling
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ID_ENCODER
from tests.support.simulated_card import SimulatedDevice, SimulatedPlans

# the decoder needs far more than the others, and so what the denoise graph has in place lies in its way
SCRATCH = {DENOISE: 2 << 20, CONTROL: 1 << 20, DECODE: 24 << 20, ID_ENCODER: 1 << 20}
CACHE = 8 << 20
WEIGHTS = {DENOISE: 40, CONTROL: 30, DECODE: 10, ID_ENCODER: 20}


def residency(
    bundle: Bundle, budget: int | None = None, scratch: Mapping[str, int] = SCRATCH
) -> ResidencyPlan:
    graphs = {name: GraphMemory(WEIGHTS[name] << 20, scratch[name]) for name in GRAPHS}
    specs, batch = bundle.manifest.specs, bundle.manifest.max_batch
    if budget is None:
        roomy = plan_residency(graphs, specs, batch, 1 << 40)
        budget = roomy.total - roomy.cache + CACHE
    return plan_residency(graphs, specs, batch, budget)


class Simulation:
    """A Compositor on a simulated card."""

    def __init__(
        self, bundle: Bundle, plan: ResidencyPlan, scratch: Mapping[str, int] = SCRATCH, window: int = 1
    ) -> None:
        self.device = SimulatedDevice()
        self.plans = SimulatedPlans(bundle, self.device, scratch)
        self.engine = TensorRTEngine(bundle, self.device, self.plans.open_plan, plan)  # type: ignore[arg-type]
        self.compositor = Compositor(bundle, self.engine, control_window=window)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def placement() -> Placement:
    reference = np.random.default_rng(1).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    reference[..., 3] = 255
    reference[:5, :, 3] = 0
    return Placement(reference, box=(30, 20, 80, 70))


def pictures(compositor: Compositor, scene: np.ndarray, placement: Placement, seed: int = 3) -> np.ndarray:
    images = compositor.composite(scene, placement, seed=seed, sampling=Sampling(steps=4), num_images=3)
    return np.stack([np.asarray(image) for image in images])


def test_same_pictures_as_onnx_runtime_bit_for_bit(
    bundle: Bundle, scene: np.ndarray, placement: Placement
) -> None:
    expected = pictures(
        Compositor(bundle, open_engine(bundle, "cpu", backend="onnxruntime")), scene, placement
    )
    for window in (1, 2):
        simulation = Simulation(bundle, residency(bundle), window=window)
        np.testing.assert_array_equal(pictures(simulation.compositor, scene, placement), expected)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_inputs_in_place_survive_decoding_in_between(
    bundle: Bundle, scene: np.ndarray, placement: Placement, eta: float
) -> None:
    """Placements one after the other: the next one starts where the decoder's scratch memory was."""
    other = Placement(placement.reference, box=(5, 5, 60, 60), mode="keep_background")
    compositors = (
        Compositor(bundle, open_engine(bundle, "cpu", backend="onnxruntime")),
        Simulation(bundle, residency(bundle)).compositor,
    )
    expected, found = (
        [
            np.asarray(image)
            for image in compositor.composite(
                scene, [placement, other], seed=1, sampling=Sampling(steps=2, eta=eta), num_images=2
            )
        ]
        for compositor in compositors
    )
    np.testing.assert_array_equal(found, expected)


def test_a_new_tensor_in_the_memory_of_an_old_one_is_seen(bundle: Bundle) -> None:
    engine, expected = (
        Simulation(bundle, residency(bundle)).engine,
        open_engine(bundle, "cpu", backend="onnxruntime"),
    )
    sizes = {"samples": 1, "rows": 2, "conditions": 2, "maps": 2}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        inputs = {
            t.name: rng.integers(0, 1, t.resolve(sizes), np.int32)
            if t.dtype == "int32"
            else rng.standard_normal(t.resolve(sizes), np.float32)
            for t in bundle.manifest.specs[DENOISE].inputs
        }
        tensors = {name: engine.to_device(array) for name, array in inputs.items()}
        found = engine.to_host(engine.run(DENOISE, tensors)["epsilon"])
        np.testing.assert_array_equal(found, expected.to_host(expected.run(DENOISE, inputs)["epsilon"]))
        del tensors


def test_steps_are_captured_once_and_replayed(
    bundle: Bundle, scene: np.ndarray, placement: Placement
) -> None:
    simulation = Simulation(bundle, residency(bundle))
    pictures(simulation.compositor, scene, placement)
    assert (simulation.device.captures, simulation.device.launches) == (1, 3)
    pictures(simulation.compositor, scene, placement, seed=50)
    assert (simulation.device.captures, simulation.device.launches) == (1, 7)


def loop(
    bundle: Bundle, engine: Engine, steps: int, samples: int = 1, seed: int = 0
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Inputs of a loop over the denoise graph: those that stay the same, and those of every step."""
    spec = bundle.manifest.specs[DENOISE]
    sizes = {"samples": samples, "rows": 2 * samples, "conditions": 2, "maps": 2}
    of_steps = [example_inputs(spec, sizes, seed + step) for step in range(steps)]
    per_step = {name: np.stack([inputs[name] for inputs in of_steps]) for name in STEP_INPUTS}
    inputs = {name: engine.to_device(a) for name, a in of_steps[0].items() if name not in STEP_INPUTS}
    return inputs, per_step


FEEDBACK = {"latent": "next_latent"}
MULTISTEP_FEEDBACK = {"latent": "next_latent", "carry": "epsilon"}


@pytest.mark.parametrize("feedback", [FEEDBACK, MULTISTEP_FEEDBACK], ids=["latent", "latent and epsilon"])
def test_a_loop_computes_the_same_as_its_steps(bundle: Bundle, feedback: dict[str, str]) -> None:
    simulation = Simulation(bundle, residency(bundle))
    onnxruntime = open_engine(bundle, "cpu", backend="onnxruntime")
    engines: tuple[Engine, ...] = (onnxruntime, simulation.engine)
    for seed in range(4):
        of_engines = [loop(bundle, engine, 3, seed=10 * seed) for engine in engines]
        expected, found = (
            engine.to_host(engine.run_steps(DENOISE, *inputs, feedback)["next_latent"])
            for engine, inputs in zip(engines, of_engines)
        )
        np.testing.assert_array_equal(found, expected)
    # step by step at first, of which the first is no launch; then one launch for all three
    assert (simulation.device.captures, simulation.device.launches) == (2, 2 + 3)


def test_pictures_that_nobody_watches_are_made_in_one_launch(
    bundle: Bundle, scene: np.ndarray, placement: Placement
) -> None:
    """Loops that were captured, and some that were not yet, against every step for itself."""
    sampling = Sampling(steps=4, map_steps=1, sampler="dpm_solver_2m")
    simulation = Simulation(bundle, residency(bundle))
    for seed in (1, 2, 3):
        expected, found = (
            simulation.compositor.run(scene, placement, seed, sampling, num_images=2, on_step=watch)
            for watch in (lambda done, total: None, None)
        )
        for result, same in zip(found, expected):
            np.testing.assert_array_equal(result.image, same.image)
    launches = simulation.device.launches
    simulation.compositor.run(scene, placement, 4, sampling, num_images=2)
    assert simulation.device.launches == launches + 1


def test_loops_and_single_steps_may_alternate(bundle: Bundle) -> None:
    """Each finds at the places what it needs, whatever the other left there."""
    engine = Simulation(bundle, residency(bundle)).engine
    inputs, per_step = loop(bundle, engine, 2)
    step = inputs | {name: values[1] for name, values in per_step.items()}
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


def test_a_loop_is_captured_for_its_shapes_and_steps(bundle: Bundle) -> None:
    simulation = Simulation(bundle, residency(bundle))
    engine, device = simulation.engine, simulation.device
    kinds = [(steps, samples) for steps in (2, 3) for samples in (1, 2)]
    for steps, samples in kinds * 2:
        engine.run_steps(DENOISE, *loop(bundle, engine, steps, samples), FEEDBACK)
    # of each number of samples a single step, too
    assert device.captures == len(kinds) + 2
    for steps, samples in kinds:
        launches = device.launches
        engine.run_steps(DENOISE, *loop(bundle, engine, steps, samples, seed=9), FEEDBACK)
        assert device.launches == launches + 1
    assert device.captures == len(kinds) + 2


def test_steps_without_room_in_the_tables_go_one_by_one(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.backends.tensorrt.engine.MOST_STEPS", 3)
    simulation = Simulation(bundle, residency(bundle))
    engine, device = simulation.engine, simulation.device
    for _ in range(3):
        launches = device.launches
        engine.run_steps(DENOISE, *loop(bundle, engine, 4), FEEDBACK)
    assert (device.captures, device.launches) == (1, launches + 4)


def test_loops_do_not_pile_up(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.tensorrt.engine.MOST_CAPTURED", 3)
    simulation = Simulation(bundle, residency(bundle))
    engine = simulation.engine
    for steps in (2, 3, 4, 5, 2):
        inputs, per_step = loop(bundle, engine, steps)
        results = [engine.run_steps(DENOISE, inputs, per_step, FEEDBACK) for _ in range(2)]
        np.testing.assert_array_equal(*(engine.to_host(result["next_latent"]) for result in results))
    assert len(engine._calls) == 3


def test_a_loop_leaves_with_its_graph(bundle: Bundle) -> None:
    engine = Simulation(bundle, residency(bundle)).engine
    inputs, per_step = loop(bundle, engine, 2)
    expected = engine.to_host(engine.run_steps(DENOISE, inputs, per_step, FEEDBACK)["next_latent"])
    engine.unload(DENOISE)
    assert not engine._calls
    found = engine.to_host(engine.run_steps(DENOISE, inputs, per_step, FEEDBACK)["next_latent"])
    np.testing.assert_array_equal(found, expected)


def test_nothing_is_allocated_after_warm_up(bundle: Bundle, scene: np.ndarray, placement: Placement) -> None:
    simulation = Simulation(bundle, residency(bundle))
    pictures(simulation.compositor, scene, placement)
    allocations, contexts = simulation.device.allocations, simulation.plans.contexts
    pictures(simulation.compositor, scene, placement, seed=50)
    assert allocations == 2  # the arena and the staging memory
    assert simulation.device.allocations == allocations
    assert simulation.plans.contexts == contexts


def test_tensors_give_their_memory_back(bundle: Bundle, scene: np.ndarray, placement: Placement) -> None:
    simulation = Simulation(bundle, residency(bundle))
    pool = simulation.engine._pool
    pictures(simulation.compositor, scene, placement)
    kept = simulation.compositor.cache.nbytes
    assert 0 < kept <= pool.nbytes - pool.free_bytes
    del simulation.compositor
    gc.collect()
    assert pool.free_bytes == pool.nbytes


def test_groups_take_turns_and_change_nothing(
    bundle: Bundle, scene: np.ndarray, placement: Placement
) -> None:
    expected = pictures(
        Compositor(bundle, open_engine(bundle, "cpu", backend="onnxruntime")), scene, placement
    )
    plan = residency(bundle)
    tight = residency(bundle, plan.total - plan.cache - 1)
    assert tight.groups == ((DENOISE, CONTROL, DECODE), (ID_ENCODER,))
    simulation = Simulation(bundle, tight)
    np.testing.assert_array_equal(pictures(simulation.compositor, scene, placement), expected)
    assert simulation.plans.opened == [ID_ENCODER, CONTROL, DENOISE, DECODE]
    other = Placement(np.asarray(placement.reference)[:30], box=(30, 20, 80, 70))
    pictures(simulation.compositor, scene, other)
    assert simulation.plans.opened[4:] == [ID_ENCODER, CONTROL, DENOISE, DECODE]
    # a known reference needs no ID encoder, and so nothing is loaded again
    np.testing.assert_array_equal(pictures(simulation.compositor, scene, placement), expected)
    assert len(simulation.plans.opened) == 8


def test_a_plan_that_needs_more_scratch_memory_here_gets_its_own(
    bundle: Bundle, scene: np.ndarray, placement: Placement
) -> None:
    expected = pictures(
        Compositor(bundle, open_engine(bundle, "cpu", backend="onnxruntime")), scene, placement
    )
    simulation = Simulation(bundle, residency(bundle, scratch=dict.fromkeys(GRAPHS, 0)))
    np.testing.assert_array_equal(pictures(simulation.compositor, scene, placement), expected)
    assert simulation.device.allocations == 2 + len(GRAPHS)


def test_many_shapes_do_not_pile_up(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.tensorrt.engine.MOST_CAPTURED", 3)
    engine, control = Simulation(bundle, residency(bundle)).engine, bundle.manifest.specs[CONTROL]
    for maps in range(1, 1 + largest_sizes(bundle.manifest.max_batch)["maps"]):
        for _ in range(2):
            engine.run(CONTROL, {t.name: np.ones(t.resolve({"maps": maps}), t.dtype) for t in control.inputs})
    assert len(engine._calls) == 3


def test_a_wrong_shape_is_named(bundle: Bundle) -> None:
    engine = Simulation(bundle, residency(bundle)).engine
    with pytest.raises(BackendError, match=r"'latent' of the graph 'decode' has shape \(1, 4, 8\)"):
        engine.run(DECODE, {"latent": np.zeros((1, 4, 8), np.float32)})


def test_a_full_pool_says_what_is_free(bundle: Bundle) -> None:
    engine = Simulation(bundle, residency(bundle)).engine
    megabyte = np.zeros(1 << 18, np.float32)
    kept = [engine.to_device(megabyte) for _ in range(engine._pool.nbytes // megabyte.nbytes)]
    with pytest.raises(OutOfDeviceMemoryError, match=r"1\.0 MB: .* of .* MB for tensors are free"):
        kept.append(engine.to_device(megabyte))


def test_concatenate_and_copies_in_pieces() -> None:
    """More than the staging memory holds, in both directions, without waiting in between."""
    device = SimulatedDevice()
    staging = Staging(device, 1000)  # type: ignore[arg-type]
    addresses = [device.allocate(2500) for _ in range(2)]
    arrays = [np.random.default_rng(i).integers(0, 256, 2500, dtype=np.uint8) for i in range(2)]
    for address, array in zip(addresses, arrays):
        staging.upload(address, array)
    for address, array in zip(addresses, arrays):
        np.testing.assert_array_equal(staging.download(address, 2500), array)


def test_concatenate_picks_rows(bundle: Bundle) -> None:
    engine = Simulation(bundle, residency(bundle)).engine
    first, second = np.arange(12, dtype=np.float16).reshape(4, 3), np.ones((2, 3), np.float16)
    joined = engine.concatenate([(engine.to_device(first), 1, 3), (engine.to_device(second), 0, 1)])
    np.testing.assert_array_equal(engine.to_host(joined), [*first[1:3], second[0]])

"""The card engine with plans on a simulated card: places, staging, groups, names. Not CUDA, not TensorRT."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.card.engine import CardEngine
from engines.card.tensors import DeviceArray, Downloads, Staging
from engines.cuda import OutOfDeviceMemoryError
from engines.errors import BackendError
from export.example_inputs import example_inputs
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ENCODE, GRAPHS, ID_ENCODER
from tests.support.simulated_card import SimulatedDevice, SimulatedPlans
from tests.support.simulated_engine import (
    SCRATCH,
    Painter,
    Simulation,
    fill,
    memory_plan,
    on_onnxruntime,
    renamed,
)


def test_same_pictures_as_onnx_runtime_bit_for_bit(bundle: Bundle, expected_pictures: np.ndarray) -> None:
    for window in (1, 2):
        painter = Simulation(bundle, window=window).painter
        np.testing.assert_array_equal(painter.paint(), expected_pictures)


@pytest.mark.parametrize("noise", [False, True])
def test_inputs_in_place_survive_decoding_in_between(bundle: Bundle, noise: bool) -> None:
    """Placements one after the other: the next one starts where the decoder's scratch memory was."""
    painters = Painter(bundle, on_onnxruntime(bundle)), Simulation(bundle).painter
    expected, found = (
        [painter.paint(seed=1, hint=hint, steps=2, samples=2, noise=noise) for hint in (0, 1)]
        for painter in painters
    )
    np.testing.assert_array_equal(found, expected)


def test_a_new_tensor_in_the_memory_of_an_old_one_is_seen(bundle: Bundle) -> None:
    engine, expected = Simulation(bundle).engine, on_onnxruntime(bundle)
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


def test_an_input_that_is_in_place_is_not_copied_again(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four runs the first copies all inputs and the second only outputs; the third has an array of the
    host for one of them, and so the fourth copies that one."""
    simulation, spec = Simulation(bundle), bundle.manifest.specs[DENOISE]
    engine, device, copies = simulation.engine, simulation.device, list[int]()
    copy = device.copy

    def counted(destination: int, source: int, nbytes: int) -> None:
        copies.append(nbytes)
        copy(destination, source, nbytes)

    arrays = example_inputs(spec, bundle.manifest.typical_sizes)
    tensors = {name: engine.to_device(array) for name, array in arrays.items()}
    monkeypatch.setattr(device, "copy", counted)
    made, results = list[int](), list[NDArray[np.float32]]()
    for inputs in (tensors, tensors, tensors | {"latent": arrays["latent"] + 1}, tensors):
        copies.clear()
        tensor = engine.run(DENOISE, inputs)["next_latent"]
        made.append(len(copies))
        results.append(engine.to_host(tensor))
    every, outputs = len(spec.inputs), len(spec.outputs)
    assert made == [every + outputs, outputs, outputs + 1, outputs + 1]
    np.testing.assert_array_equal(results[1], results[0])
    assert (results[2] != results[0]).any()
    np.testing.assert_array_equal(results[3], results[0])


def test_nothing_is_allocated_after_warm_up(bundle: Bundle) -> None:
    simulation = Simulation(bundle)
    simulation.painter.paint()
    allocations, contexts = simulation.device.allocations, simulation.plans.contexts
    simulation.painter.paint(seed=50)
    assert allocations == 3  # the arena, and pinned memory for both directions
    assert simulation.device.allocations == allocations
    assert simulation.plans.contexts == contexts


def test_tensors_give_their_memory_back(bundle: Bundle) -> None:
    simulation = Simulation(bundle)
    engine = simulation.engine
    simulation.painter.paint()
    assert 0 < simulation.painter.kept_bytes <= engine.pool_bytes - engine.free_bytes
    del simulation.painter
    gc.collect()
    assert engine.free_bytes == engine.pool_bytes


def test_a_closed_engine_leaves_nothing_on_the_card(bundle: Bundle) -> None:
    simulation = Simulation(bundle)
    simulation.painter.paint()
    assert simulation.device.allocated > simulation.engine.pool_bytes
    simulation.engine.close()
    assert simulation.device.allocated == simulation.engine.cached_calls == 0


def test_groups_are_swapped_and_change_nothing(bundle: Bundle, expected_pictures: np.ndarray) -> None:
    plan = memory_plan(bundle)
    tight = memory_plan(bundle, plan.total - plan.cache - 1)
    assert tight.groups == ((CONTROL, DENOISE, DECODE), (ID_ENCODER, ENCODE))
    simulation = Simulation(bundle, tight)
    np.testing.assert_array_equal(simulation.painter.paint(), expected_pictures)
    assert simulation.plans.opened == [ID_ENCODER, CONTROL, DENOISE, DECODE]
    simulation.painter.paint(reference=1)
    assert simulation.plans.opened[4:] == [ID_ENCODER, CONTROL, DENOISE, DECODE]
    # a known reference needs no ID encoder, and so nothing is loaded again
    np.testing.assert_array_equal(simulation.painter.paint(), expected_pictures)
    assert len(simulation.plans.opened) == 8


def test_a_plan_that_needs_more_scratch_memory_here_gets_its_own(
    bundle: Bundle, expected_pictures: np.ndarray
) -> None:
    simulation = Simulation(bundle, memory_plan(bundle, scratch=dict.fromkeys(GRAPHS, 0)))
    np.testing.assert_array_equal(simulation.painter.paint(), expected_pictures)
    assert simulation.device.allocations == 2 + len(GRAPHS)  # nobody encoded a picture


def test_a_wrong_shape_is_named(bundle: Bundle) -> None:
    engine = Simulation(bundle).engine
    with pytest.raises(BackendError, match=r"'latent' of the graph 'decode' has shape \(1, 4, 8\)"):
        engine.run(DECODE, {"latent": np.zeros((1, 4, 8), np.float32)})


def test_a_full_pool_says_what_is_free(bundle: Bundle) -> None:
    engine = Simulation(bundle).engine
    megabyte = np.zeros(1 << 18, np.float32)
    kept = [engine.to_device(megabyte) for _ in range(engine.pool_bytes // megabyte.nbytes)]
    with pytest.raises(OutOfDeviceMemoryError, match=r"1\.0 MB: .* of .* MB for tensors are free"):
        kept.append(engine.to_device(megabyte))


def test_a_call_without_room_for_its_results_leaves_nothing_to_the_next(bundle: Bundle) -> None:
    """The decoder has run by then, over what lies in place for the next step."""
    engine, specs = Simulation(bundle).engine, bundle.manifest.specs
    arrays = example_inputs(specs[DENOISE], bundle.manifest.typical_sizes)
    inputs = {name: engine.to_device(array) for name, array in arrays.items()}
    latent = example_inputs(specs[DECODE], bundle.manifest.typical_sizes)
    expected = engine.to_host(engine.run(DENOISE, inputs)["next_latent"])
    kept = fill(engine)
    with pytest.raises(OutOfDeviceMemoryError):
        engine.run(DECODE, latent)
    kept.clear()
    np.testing.assert_array_equal(engine.to_host(engine.run(DENOISE, inputs)["next_latent"]), expected)


def test_an_engine_without_room_leaves_nothing_on_the_card(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimulatedDevice()
    allocate = device.allocate_pinned

    def allocate_once(nbytes: int) -> tuple[int, NDArray[np.uint8]]:
        monkeypatch.setattr(device, "allocate_pinned", refuse)
        return allocate(nbytes)

    def refuse(nbytes: int) -> NoReturn:
        raise BackendError("no memory can be pinned")

    monkeypatch.setattr(device, "allocate_pinned", allocate_once)
    plans = SimulatedPlans(bundle, device, SCRATCH)
    with pytest.raises(BackendError, match="no memory can be pinned"):
        CardEngine("tensorrt", bundle, device, plans.open_plan, memory_plan(bundle))  # type: ignore[arg-type]
    assert device.allocated == 0


def test_tensors_that_only_a_cycle_holds_make_room(bundle: Bundle) -> None:
    class Holder:
        def __init__(self, tensors: list[DeviceArray]) -> None:
            self.tensors, self.itself = tensors, self

    engine = Simulation(bundle).engine
    megabyte = np.zeros(1 << 18, np.float32)
    gc.collect()
    gc.disable()
    try:
        Holder([engine.to_device(megabyte) for _ in range(engine.pool_bytes // megabyte.nbytes)])
        assert engine.free_bytes < megabyte.nbytes
        assert engine.to_device(megabyte).nbytes == megabyte.nbytes
    finally:
        gc.enable()


def test_concatenate_and_copies_in_pieces() -> None:
    """More than the staging memory holds, in both directions, without waiting in between."""
    device = SimulatedDevice()
    staging = Staging(device, 1000)  # type: ignore[arg-type]
    downloads = Downloads(device, threading.RLock(), 1000)  # type: ignore[arg-type]
    addresses = [device.allocate(2500) for _ in range(2)]
    arrays = [np.random.default_rng(i).integers(0, 256, 2500, dtype=np.uint8) for i in range(2)]
    for address, array in zip(addresses, arrays):
        staging.upload(address, array)
    for address, array in zip(addresses, arrays):
        tensor = DeviceArray(address, array.shape, array.dtype)
        np.testing.assert_array_equal(downloads.fetch(tensor), array)


def test_who_waits_for_a_tensor_keeps_nobody_from_the_card(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture is on its way until two steps were taken in another thread."""
    simulation = Simulation(bundle)
    engine, device, reached = simulation.engine, simulation.device, simulation.device.reached
    inputs = example_inputs(bundle.manifest.specs[DENOISE], bundle.manifest.typical_sizes)
    array = np.arange(12, dtype=np.float32)
    tensor = engine.to_device(array)
    asked, stepped = threading.Event(), threading.Event()

    def reached_after_the_steps(event: list[bool]) -> bool:
        asked.set()
        return stepped.is_set() and reached(event)

    monkeypatch.setattr(device, "reached", reached_after_the_steps)
    with ThreadPoolExecutor(1) as threads:
        fetched = threads.submit(engine.to_host, tensor)
        assert asked.wait(60)
        for _ in range(2):
            engine.run(DENOISE, inputs)
        stepped.set()
        np.testing.assert_array_equal(fetched.result(), array)


def test_concatenate_picks_rows(bundle: Bundle) -> None:
    engine = Simulation(bundle).engine
    first, second = np.arange(12, dtype=np.float16).reshape(4, 3), np.ones((2, 3), np.float16)
    joined = engine.concatenate([(engine.to_device(first), 1, 3), (engine.to_device(second), 0, 1)])
    np.testing.assert_array_equal(engine.to_host(joined), [*first[1:3], second[0]])


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_plan_may_have_other_names_than_the_manifest(bundle: Bundle, graph: str) -> None:
    """As those have that were built before inputs were renamed."""
    inputs = example_inputs(bundle.manifest.specs[graph], bundle.manifest.typical_sizes)
    engine, ours = on_onnxruntime(bundle), Simulation(renamed(bundle)).engine
    expected = engine.run(graph, inputs)
    for _ in range(3):
        found = ours.run(graph, {f"our {name}": array for name, array in inputs.items()})
        assert list(found) == [f"our {name}" for name in expected]
        for name, value in expected.items():
            np.testing.assert_array_equal(ours.to_host(found[f"our {name}"]), engine.to_host(value))

"""Several engines of one process with ONNX Runtime's CUDA provider, on a simulated card."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest

from engines.backends.onnxruntime import cuda
from engines.bundle import Bundle
from engines.memory_plan import further_windows
from engines.options import EngineOptions
from tests.support.simulated_card import SimulatedDevice
from tests.support.simulated_engine import SCRATCH, ProviderSimulation, memory_plan
from tests.support.simulated_provider import SimulatedLibrary


def test_two_engines_of_a_process_draw_what_each_draws_alone(
    bundle: Bundle, expected_pictures: np.ndarray
) -> None:
    """Their sessions share scratch memory: they are made and run in turn."""
    first = ProviderSimulation(bundle)
    second = ProviderSimulation(bundle, beside=first)

    def paint(simulation: ProviderSimulation) -> list[np.ndarray]:
        return [simulation.painter.paint() for _ in range(3)]

    with ThreadPoolExecutor(2) as threads:
        for pictures in threads.map(paint, (first, second)):
            for picture in pictures:
                np.testing.assert_array_equal(picture, expected_pictures)
    assert first.library.registered == 1


def test_an_engine_waits_until_another_one_of_the_process_is_done_with_the_card(bundle: Bundle) -> None:
    first = ProviderSimulation(bundle)
    second = ProviderSimulation(bundle, beside=first)
    with ThreadPoolExecutor(1) as threads:
        with first.shared.lock:
            waiting = threads.submit(second.engine.to_device, np.ones(3, np.float32))
            done, _ = wait([waiting], timeout=0.1)
            assert not done
        assert waiting.result().shape == (3,)


def test_the_scratch_memory_of_a_process_suffices_for_each_of_its_engines(bundle: Bundle) -> None:
    small, large = (
        memory_plan(bundle, scratch=dict.fromkeys(SCRATCH, size << 20), backend="onnxruntime")
        for size in (2, 9)
    )
    assert small.library < large.library
    first = ProviderSimulation(bundle, small)
    second = ProviderSimulation(bundle, large, beside=first)
    shared, library, memory = first.shared, first.library, first.sessions.memory
    assert memory.scratch.largest_block == large.library
    assert memory.limit == large.library_limit + small.library_limit
    # an engine that is gone does not count, and its scratch memory is there for the next one
    del first
    gc.collect()
    nbytes = memory.scratch.nbytes
    third = cuda.Sessions(library, bundle, shared, second.device.stream, small, EngineOptions())
    assert memory.limit == large.library_limit + small.library_limit, third
    assert memory.scratch.nbytes == nbytes
    # one that comes when all others are gone starts anew
    device = second.device
    del second, third
    gc.collect()
    fourth = cuda.Sessions(library, bundle, shared, device.stream, small, EngineOptions())
    assert (memory.scratch.nbytes, memory.limit) == (small.library, small.library_limit), fourth


def test_opened_engines_share_a_stream_and_a_lock(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice()
    streams = []

    def on_stream(stream: int | None) -> SimulatedDevice:
        streams.append(stream)
        return device

    monkeypatch.setattr(cuda, "Device", on_stream)
    monkeypatch.setattr(cuda, "_OF_THIS_PROCESS", cuda.SharedStream())
    library = SimulatedLibrary(bundle, device)
    engines = [cuda.open_card_engine(library, bundle, EngineOptions()) for _ in range(2)]
    # of the first engine, of the provider, and of the second engine
    assert streams == [None, device.stream, device.stream]
    assert library.registered == 1
    with ThreadPoolExecutor(1) as threads, cuda._OF_THIS_PROCESS.lock:
        waiting = [threads.submit(engine.to_device, np.ones(3, np.float32)) for engine in engines]
        assert not wait(waiting, timeout=0.1).done


def test_nothing_is_allocated_for_what_nobody_keeps(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice()
    monkeypatch.setattr(cuda, "Device", lambda stream: device)
    library = SimulatedLibrary(bundle, device)
    plans = [cuda.open_card_engine(library, bundle, EngineOptions(), most).plan for most in (0, None)]
    assert plans[0].cache == further_windows(bundle.manifest) < plans[1].cache

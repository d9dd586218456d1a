"""The card engine with ONNX Runtime's CUDA provider, on a simulated card. Not CUDA, and not the provider."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.backends.onnxruntime import cuda
from engines.backends.onnxruntime.engine import check_version
from engines.bundle import Bundle
from engines.cuda import OutOfDeviceMemoryError
from engines.errors import BackendError, BundleError
from engines.memory_plan import plan_device_memory
from engines.options import EngineOptions
from export.example_inputs import example_inputs
from runtime import Compositor, Placement, Sampling
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ENCODE, ID_ENCODER
from tests.support.observers import RunCounter
from tests.support.simulated_engine import (
    Painter,
    ProviderSimulation,
    memory_plan,
    on_onnxruntime,
    renamed,
)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("window", [1, 2])
def test_same_pictures_as_on_the_cpu_bit_for_bit(
    bundle: Bundle, expected_pictures: np.ndarray, window: int, capture: bool
) -> None:
    simulation = ProviderSimulation(bundle, window=window, options=EngineOptions(cuda_graphs=capture))
    np.testing.assert_array_equal(simulation.painter.paint(), expected_pictures)
    np.testing.assert_array_equal(simulation.painter.paint(), expected_pictures)
    captured = {session.graph for session in simulation.library.sessions if session.captured}
    assert captured == ({DENOISE, CONTROL, DECODE} if capture else set())


def test_sampling_and_decoding_overlap_while_new_shapes_come(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures are made at once from two threads, in more shapes than are captured, and nobody waits for
    anything but pictures."""
    monkeypatch.setattr(cuda, "MOST_CAPTURED", 2)
    simulation, plain = ProviderSimulation(bundle), on_onnxruntime(bundle)
    jobs = [(samples, seed) for seed in range(3) for samples in (1, 2, 3, 4)]
    painters = [Painter(bundle, simulation.engine) for _ in range(2)]

    def paint(number: int) -> list[np.ndarray]:
        return [painters[number].paint(seed, samples=samples, steps=3) for samples, seed in jobs]

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(paint, range(2)))
    painter = Painter(bundle, plain)
    expected = [painter.paint(seed, samples=samples, steps=3) for samples, seed in jobs]
    for pictures in found:
        for picture, right in zip(pictures, expected, strict=True):
            np.testing.assert_array_equal(picture, right)
    (step,) = (session for session in simulation.library.sessions if session.graph == DENOISE)
    assert len(step.captured) == 2
    # all in one thread: a capture belongs to the thread that made it
    assert len({thread for session in simulation.library.sessions for thread, _ in session.captured}) == 1


def test_a_step_is_enqueued_while_a_decoded_picture_is_still_to_come(bundle: Bundle) -> None:
    """The host reads the picture after the steps that came later, and finds what the decoder made."""
    simulation, plain = ProviderSimulation(bundle), on_onnxruntime(bundle)
    latent = np.random.default_rng(1).standard_normal((1, *bundle.manifest.latent_shape), np.float32)
    inputs = example_inputs(bundle.manifest.specs[DENOISE], bundle.manifest.typical_sizes)
    pictures = [engine.run(DECODE, {"latent": latent})["image"] for engine in (simulation.engine, plain)]
    for _ in range(3):
        results = simulation.engine.run(DENOISE, inputs)
    other = simulation.engine.run(DECODE, {"latent": latent + 1})["image"]
    np.testing.assert_array_equal(simulation.engine.to_host(pictures[0]), plain.to_host(pictures[1]))
    for name, value in plain.run(DENOISE, inputs).items():
        np.testing.assert_array_equal(simulation.engine.to_host(results[name]), plain.to_host(value))
    expected = plain.run(DECODE, {"latent": latent + 1})["image"]
    np.testing.assert_array_equal(simulation.engine.to_host(other), plain.to_host(expected))


def test_several_steps_wait_for_nothing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation, plain = ProviderSimulation(bundle), on_onnxruntime(bundle)
    spec, sizes = bundle.manifest.step, bundle.manifest.typical_sizes
    of_steps = [example_inputs(spec, sizes, seed) for seed in range(4)]
    per_step = {name: np.stack([inputs[name] for inputs in of_steps]) for name in spec.per_step}
    inputs = {name: array for name, array in of_steps[0].items() if name not in spec.per_step}
    feedback = {"latent": "next_latent", "carry": "epsilon"}
    expected = plain.to_host(plain.run_steps(DENOISE, inputs, per_step, feedback)["next_latent"])
    simulation.engine.run_steps(DENOISE, inputs, per_step, feedback)
    waits: list[Callable[[], None]] = []
    with monkeypatch.context() as patch:
        patch.setattr(simulation.device, "synchronize", lambda: waits.append(lambda: None))
        result = simulation.engine.run_steps(DENOISE, inputs, per_step, feedback)["next_latent"]
    assert not waits
    np.testing.assert_array_equal(simulation.engine.to_host(result), expected)
    (session,) = simulation.library.sessions
    assert (len(session.captured), session.replays) == (1, 7)


def test_a_compositor_computes_the_detail_maps_of_a_whole_batch_at_a_time(bundle: Bundle) -> None:
    """Nine steps, with detail maps of four in a call; another seed needs none."""
    scene = np.random.default_rng(1).integers(0, 256, (70, 80, 3), np.uint8)
    placement = Placement(np.full((40, 40, 4), 200, np.uint8), box=(20, 20, 60, 60))
    simulation, counter = ProviderSimulation(bundle), RunCounter()
    simulation.engine.observer = counter
    pictures = [
        np.asarray(compositor.composite(scene, placement, seed=seed, sampling=Sampling(steps=9)))
        for compositor in (Compositor(bundle, simulation.engine), Compositor(bundle, on_onnxruntime(bundle)))
        for seed in (1, 2)
    ]
    np.testing.assert_array_equal(pictures[:2], pictures[2:])
    assert counter.rows[CONTROL] == [8, 8, 2]


def test_nothing_is_allocated_after_warm_up(bundle: Bundle) -> None:
    simulation = ProviderSimulation(bundle)
    simulation.painter.paint()
    bindings = simulation.library.bindings
    simulation.painter.paint(seed=50)
    # the provider's scratch memory, the weights of each graph, the arena, and pinned memory, for both ways
    assert simulation.device.allocations == 4 + len(simulation.library.sessions)
    assert simulation.library.bindings == bindings


def test_the_provider_gets_what_the_plan_says(bundle: Bundle) -> None:
    simulation = ProviderSimulation(bundle)
    plan, memory = simulation.plan, simulation.sessions.memory
    assert memory.scratch.nbytes == plan.library >= max(m.scratch for m in plan.graphs.values())
    for graph in plan.graphs:
        simulation.engine.load(graph)
    assert memory.weights.nbytes == plan.weights
    assert plan.context + memory.limit + plan.arena == plan.budget
    assert plan.context + plan.weights + plan.library + plan.arena == plan.total <= plan.budget
    assert "library" in plan.table()
    assert "library" not in memory_plan(bundle).table()


def test_a_graph_that_is_unloaded_gives_its_weights_back(bundle: Bundle) -> None:
    simulation = ProviderSimulation(bundle)
    simulation.painter.paint()
    before = simulation.device.allocated
    simulation.engine.unload(DECODE)
    gc.collect()
    assert before - simulation.device.allocated == simulation.plan.graphs[DECODE].weights


def test_more_than_the_budget_is_refused_and_the_engine_goes_on(
    bundle: Bundle, expected_pictures: np.ndarray
) -> None:
    plan = memory_plan(bundle, backend="onnxruntime")
    simulation = ProviderSimulation(bundle, memory_plan(bundle, plan.total, backend="onnxruntime"))
    for graph in bundle.manifest.specs:
        simulation.engine.load(graph)
    as_ever, simulation.library.scratch = simulation.library.scratch, [1 << 19, plan.library]
    said = r"no room to run the graph 'id_encoder' \(\d+ MB are needed, 0 MB are left of the memory budget\)"
    with pytest.raises(OutOfDeviceMemoryError, match=said):
        simulation.painter.paint()
    simulation.library.scratch = as_ever
    np.testing.assert_array_equal(simulation.painter.paint(), expected_pictures)


def test_a_bundle_that_says_nothing_of_cards_is_planned_from_a_cpu(bundle: Bundle) -> None:
    scratch = {name: of.scratch_bytes["onnxruntime"] for name, of in bundle.manifest.graphs.items()}
    graphs = {
        name: replace(record, scratch_bytes={"onnxruntime": scratch[name]})
        for name, record in bundle.manifest.graphs.items()
    }
    plan = plan_device_memory(replace(bundle.manifest, graphs=graphs), 10**9)
    assert plan.library >= bundle.manifest.max_batch * max(scratch.values()) > 0


def test_a_bundle_says_what_its_largest_calls_take_on_a_card(bundle: Bundle) -> None:
    plan = plan_device_memory(bundle.manifest, 10**9)
    for name, record in bundle.manifest.graphs.items():
        assert (
            plan.graphs[name].scratch == record.scratch_bytes["cuda"] >= record.scratch_bytes["onnxruntime"]
        )


def test_groups_are_swapped_and_captured_anew(bundle: Bundle, expected_pictures: np.ndarray) -> None:
    plan = memory_plan(bundle, backend="onnxruntime")
    tight = memory_plan(bundle, plan.total - plan.cache - 1, backend="onnxruntime")
    assert tight.groups == ((CONTROL, DENOISE, DECODE), (ID_ENCODER, ENCODE))
    simulation = ProviderSimulation(bundle, tight)
    for _ in range(2):
        np.testing.assert_array_equal(simulation.painter.paint(), expected_pictures)
        simulation.painter.paint(reference=1)
    assert simulation.library.opened == [ID_ENCODER, CONTROL, DENOISE, DECODE] * 2


def test_shapes_that_come_back_are_replayed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if their call was evicted: the provider cannot drop a capture, and need not make another."""
    monkeypatch.setattr("engines.card.capture.MOST_CALLS", 1)
    simulation, spec = ProviderSimulation(bundle), bundle.manifest.specs[CONTROL]
    for maps in (1, 2, 1, 2):
        simulation.engine.run(CONTROL, example_inputs(spec, {"maps": maps}))
    (session,) = simulation.library.sessions
    assert [number for _, number in session.captured] == ["1", "2"]
    assert session.replays == 2


@pytest.mark.parametrize("placements", [1, 2])
def test_one_capture_serves_any_number_of_placements(bundle: Bundle, placements: int) -> None:
    """A row of the call names the rows of the banks that it reads; what else lies there does not matter."""
    simulation, plain = ProviderSimulation(bundle), on_onnxruntime(bundle)
    spec, samples = bundle.manifest.specs[DENOISE], {"samples": 2, "rows": 4}
    for windows in (1, 2, 4):
        sizes = samples | {"conditions": 2 * placements, "maps": 2 * windows}
        inputs = example_inputs(spec, sizes, seed=windows)
        found, expected = (
            engine.to_host(engine.run(DENOISE, inputs)["next_latent"])
            for engine in (simulation.engine, plain)
        )
        np.testing.assert_array_equal(found, expected)
    (session,) = simulation.library.sessions
    assert [number for _, number in session.captured] == ["1"]


def test_a_warm_up_captures_what_requests_will_call(bundle: Bundle, expected_pictures: np.ndarray) -> None:
    simulation = ProviderSimulation(bundle, window=2)
    warmed = list(simulation.engine.warm_up(samples=3, window=2))
    assert warmed == [*(name for name in bundle.manifest.specs if name != DENOISE), *[DENOISE] * 6]
    captured = {session.graph: len(session.captured) for session in simulation.library.sessions}
    assert captured == {ID_ENCODER: 0, CONTROL: 1, ENCODE: 0, DECODE: 1, DENOISE: 6}
    np.testing.assert_array_equal(simulation.painter.paint(), expected_pictures)
    simulation.painter.paint(samples=2)
    assert captured == {session.graph: len(session.captured) for session in simulation.library.sessions}


def test_no_warm_up_where_graphs_are_swapped(bundle: Bundle) -> None:
    plan = memory_plan(bundle, backend="onnxruntime")
    tight = memory_plan(bundle, plan.total - plan.cache - 1, backend="onnxruntime")
    simulation = ProviderSimulation(bundle, tight)
    assert list(simulation.engine.warm_up(samples=4, window=1)) == []
    assert simulation.library.opened == []


def test_sessions_go_with_their_graph(bundle: Bundle) -> None:
    simulation = ProviderSimulation(bundle)
    simulation.painter.paint()
    before = {session.graph for session in simulation.library.sessions}
    simulation.engine.unload(DENOISE)
    gc.collect()
    assert before - {session.graph for session in simulation.library.sessions} == {DENOISE}


def test_a_graph_with_other_names_than_the_manifest(bundle: Bundle) -> None:
    simulation = ProviderSimulation(renamed(bundle), memory_plan(renamed(bundle), backend="onnxruntime"))
    inputs = example_inputs(bundle.manifest.specs[DECODE], {})
    plain = on_onnxruntime(bundle)
    found = simulation.engine.run(DECODE, {f"our {name}": array for name, array in inputs.items()})
    expected = plain.run(DECODE, inputs)["image"]
    np.testing.assert_array_equal(simulation.engine.to_host(found["our image"]), plain.to_host(expected))


def test_more_than_the_largest_call_is_refused(bundle: Bundle) -> None:
    simulation = ProviderSimulation(bundle)
    inputs = example_inputs(bundle.manifest.specs[CONTROL], {"maps": 99})
    with pytest.raises(BackendError, match="'control' takes up to 8 maps in a call, not 99"):
        simulation.engine.run(CONTROL, inputs)


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", "0"), ("tf32", "1")])
def test_fp32_is_not_tf32(bundle: Bundle, precision: str, tf32: str) -> None:
    simulation = ProviderSimulation(bundle, options=EngineOptions(inference_precision=precision))
    simulation.engine.load(DENOISE)
    (session,) = simulation.library.sessions
    assert session.provider_options["use_tf32"] == tf32


def test_sessions_compute_the_same_bits_and_grow_no_more(bundle: Bundle) -> None:
    simulation = ProviderSimulation(bundle)
    for graph in (DENOISE, ID_ENCODER):
        simulation.engine.load(graph)
    step, encoder = simulation.library.sessions
    assert step.options.use_deterministic_compute
    assert not step.options.enable_mem_pattern
    assert not step.options.enable_mem_reuse
    assert step.provider_options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert step.provider_options["enable_skip_layer_norm_strict_mode"] == "1"
    assert (step.provider_options["enable_cuda_graph"], encoder.provider_options["enable_cuda_graph"]) == (
        "1",
        "0",
    )


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        ("Available memory of 1 is smaller than requested bytes of 2", OutOfDeviceMemoryError, "has no room"),
        ("CUDA failure 2: out of memory", OutOfDeviceMemoryError, "has no room"),
        (
            "This session cannot use the graph capture feature as requested by the user as all the graph "
            "nodes have not been assigned to CUDAExecutionProvider",
            BundleError,
            "run with --no-cuda-graphs",
        ),
        ("protobuf parsing failed", BundleError, "cannot load the graph 'decode': protobuf parsing failed"),
    ],
)
def test_a_graph_that_cannot_be_loaded(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, said: str, kind: type[Exception], sentence: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{said}\nand where in its code")

    simulation = ProviderSimulation(bundle)
    monkeypatch.setattr(simulation.library, "InferenceSession", fail)
    with pytest.raises(kind, match=sentence):
        simulation.engine.load(DECODE)


def test_a_graph_that_does_not_run_says_why(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = ProviderSimulation(bundle)
    simulation.engine.load(DECODE)
    (session,) = simulation.library.sessions

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Available memory of 1 is smaller than requested bytes of 2")

    monkeypatch.setattr(session, "run_with_iobinding", fail)
    with pytest.raises(OutOfDeviceMemoryError, match=r"no room to run the graph 'decode' .*--memory-budget"):
        simulation.engine.run(DECODE, example_inputs(bundle.manifest.specs[DECODE], {}))


def test_a_card_needs_a_library_whose_captures_are_right() -> None:
    with pytest.raises(
        BackendError, match=r"1\.29\.0 is too old for a card, it must be 1\.30 .*'\.\[cuda\]'"
    ):
        check_version("1.29.0", cuda.FIRST_VERSION, " for a card")


def test_libraries_are_found_where_they_are(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 0 08:01 1  /venv/nvidia/cu13/lib/libcublas.so.13\n"
        "7f02-7f03 r--p 0 08:01 2  /venv/nvidia/cu13/lib/libcudart.so.13\n"
        "7f04-7f05 r-xp 0 08:01 3  /venv/nvidia/cudnn/lib/libcudnn.so.9\n"
        "7f06-7f07 rw-p 0 00:00 0  [heap]\n"
    )
    found = "cublas, cudart in /venv/nvidia/cu13/lib; cudnn in /venv/nvidia/cudnn/lib"
    assert cuda.loaded_libraries(maps) == found
    assert cuda.loaded_libraries(tmp_path / "none") == ""

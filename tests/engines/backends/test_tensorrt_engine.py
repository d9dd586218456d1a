"""The TensorRT engine on a simulated card: places, staging, capture, groups. Not CUDA, and not TensorRT."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.backends.tensorrt.engine import TensorRTEngine
from engines.backends.tensorrt.tensors import Staging
from engines.bundle import Bundle
from engines.cuda import OutOfDeviceMemoryError
from engines.engine import DeviceTensor, Engine, open_engine
from engines.errors import BackendError
from engines.memory_plan import DeviceMemoryPlan, plan_device_memory
from engines.options import EngineOptions
from engines.spec import GraphSpec
from export.onnx_graph import example_inputs
from export.systems.anydoor import CONTROL, DECODE, DENOISE, ID_ENCODER
from tests.support.simulated_card import SimulatedDevice, SimulatedPlans

# the decoder needs far more than the others, and so what the denoise graph has in place lies in its way
SCRATCH = {DENOISE: 2 << 20, CONTROL: 1 << 20, DECODE: 24 << 20, ID_ENCODER: 1 << 20}
CACHE = 8 << 20
WEIGHTS = {DENOISE: 40, CONTROL: 30, DECODE: 10, ID_ENCODER: 20}
GRAPHS = tuple(WEIGHTS)


def memory_plan(
    bundle: Bundle, budget: int | None = None, scratch: Mapping[str, int] = SCRATCH
) -> DeviceMemoryPlan:
    """The plan for graphs of these sizes; its cache is small if no budget is given."""
    graphs = {
        name: replace(
            record,
            files=(replace(record.files[0], bytes=WEIGHTS[name] << 20),),
            scratch_bytes={bundle.manifest.backend: scratch[name]},
        )
        for name, record in bundle.manifest.graphs.items()
    }
    manifest = replace(bundle.manifest, graphs=graphs)
    if budget is None:
        roomy = plan_device_memory(manifest, 1 << 40)
        budget = roomy.total - roomy.cache + CACHE
    return plan_device_memory(manifest, budget)


class Simulation:
    """A TensorRT engine on a simulated card."""

    def __init__(
        self,
        bundle: Bundle,
        plan: DeviceMemoryPlan | None = None,
        scratch: Mapping[str, int] = SCRATCH,
        window: int = 1,
    ) -> None:
        self.device = SimulatedDevice()
        self.plans = SimulatedPlans(bundle, self.device, scratch)
        plan = plan or memory_plan(bundle)
        self.engine = TensorRTEngine(bundle, self.device, self.plans.open_plan, plan)  # type: ignore[arg-type]
        self.painter = Painter(bundle, self.engine, window)


class Painter:
    """Takes samples through all graphs, as the runtime does. What it needs follows from numbers."""

    def __init__(self, bundle: Bundle, engine: Engine, window: int = 1) -> None:
        self._bundle = bundle
        self._engine = engine
        self._window = window
        self._tokens: dict[int, np.ndarray] = {}
        self._maps: dict[tuple[int, int, int], list[dict[str, DeviceTensor]]] = {}

    @property
    def kept_bytes(self) -> int:
        """Device memory of detail maps that are kept for a re-roll."""
        windows = [maps for of_placement in self._maps.values() for maps in of_placement]
        return sum(self._engine.nbytes(tensor) for maps in windows for tensor in maps.values())

    def paint(
        self,
        seed: int = 3,
        reference: int = 0,
        hint: int = 0,
        steps: int = 4,
        samples: int = 3,
        noise: bool = False,
        multistep: bool = False,
        at_once: bool = False,
    ) -> np.ndarray:
        """(N, H, W, 3) pictures.

        Args:
            seed: of the noise to start from, and of that of every step.
            reference: which one; its tokens are kept.
            hint: which one; detail maps are kept for it, the reference and the steps.
            steps: how many.
            samples: how many share each call.
            noise: whether every step adds some.
            multistep: whether every step takes the epsilon of the step before.
            at_once: whether the steps of a window are one call.
        """
        rng, shape = np.random.default_rng(seed), (samples, *self._bundle.manifest.latent_shape)
        tokens = self._tokens_of(reference)
        latent: Any = self._engine.to_device(rng.standard_normal(shape, np.float32))
        carry: Any = self._engine.to_device(np.zeros(shape, np.float32))
        on_device = self._engine.to_device(tokens)
        feedback = {"latent": "next_latent"} | ({"carry": "epsilon"} if multistep else {})
        for number, maps in enumerate(self._maps_of(reference, hint, steps, tokens)):
            start = number * self._window
            numbers = [
                step_numbers(step, step - start, samples, steps)
                for step in range(start, min(start + self._window, steps))
            ]
            for numbers_at_once in [numbers] if at_once else [[one] for one in numbers]:
                if noise:
                    carry = self._engine.to_device(rng.standard_normal(shape, np.float32))
                inputs = {"latent": latent, "carry": carry, "tokens": on_device, **maps}
                if at_once:
                    per_step = {name: np.stack([n[name] for n in numbers]) for name in numbers[0]}
                    results = self._engine.run_steps(DENOISE, inputs, per_step, feedback)
                else:
                    results = self._engine.run(DENOISE, inputs | numbers_at_once[0])
                latent, carry = results["next_latent"], results["epsilon"] if multistep else carry
        return np.concatenate([self._decode(latent, sample) for sample in range(samples)])

    def _tokens_of(self, reference: int) -> np.ndarray:
        if reference not in self._tokens:
            (spec,) = self._bundle.manifest.specs[ID_ENCODER].inputs
            picture = np.random.default_rng([1, reference]).random(spec.resolve({"samples": 1}), np.float32)
            tokens = self._engine.run(ID_ENCODER, {"reference": picture})["tokens"]
            unconditional = self._bundle.constants()["unconditional_tokens"]
            self._tokens[reference] = np.concatenate([self._engine.to_host(tokens), unconditional])
        return self._tokens[reference]

    def _maps_of(
        self, reference: int, hint: int, steps: int, tokens: np.ndarray
    ) -> Iterator[dict[str, DeviceTensor]]:
        """Detail maps, one window after the other: each is computed when the steps before it are done."""
        shape = self._bundle.manifest.specs[CONTROL].tensor("hint").resolve({})
        inputs = {"hint": np.random.default_rng([2, hint]).uniform(-1, 1, shape).astype(np.float32)}
        kept = self._maps.setdefault((reference, hint, steps), [])
        for start in range(0, steps, self._window):
            if len(kept) * self._window <= start:
                of_steps = timesteps(steps)[start : start + self._window]
                inputs |= {"timestep": np.repeat(of_steps, 2), "tokens": np.tile(tokens, (len(of_steps), 1, 1))}
                kept.append(self._engine.run(CONTROL, inputs))
            yield kept[start // self._window]

    def _decode(self, latents: DeviceTensor, sample: int) -> np.ndarray:
        latent = self._engine.concatenate([(latents, sample, sample + 1)])
        return self._engine.to_host(self._engine.run(DECODE, {"latent": latent}, ["image"])["image"])


def timesteps(steps: int) -> np.ndarray:
    return np.linspace(981, 1, steps, dtype=np.float32).round()


def step_numbers(step: int, ahead: int, samples: int, steps: int) -> dict[str, np.ndarray]:
    """What the step graph is told of a step; its maps are those of the place `ahead` in the window."""
    every, halves = np.arange(samples, dtype=np.int32), np.repeat(np.int32([0, 1]), samples)
    return {
        "timestep": np.full(samples, timesteps(steps)[step]),
        "guidance_scale": np.full(samples, 5, np.float32),
        "control_scale": np.ones(samples, np.float32),
        "coefficients": np.tile(np.float32([1.02, -0.1 * (step + 1), 0.05]), (samples, 1)),
        "conditional_row": every,
        "unconditional_row": every + np.int32(samples),
        "row_sample": np.tile(every, 2),
        "row_condition": halves,
        "row_map": np.int32(2 * ahead) + halves,
    }


def on_onnxruntime(bundle: Bundle) -> Engine:
    return open_engine(bundle, EngineOptions(backend="onnxruntime", device="cpu"))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def expected_pictures(bundle: Bundle) -> np.ndarray:
    """What ONNX Runtime paints."""
    pictures = Painter(bundle, on_onnxruntime(bundle)).paint()
    assert len(np.unique(pictures)) > 100
    return pictures


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


def test_steps_are_captured_once_and_replayed(bundle: Bundle) -> None:
    simulation = Simulation(bundle)
    simulation.painter.paint()
    assert (simulation.device.captures, simulation.device.launches) == (1, 3)
    simulation.painter.paint(seed=50)
    assert (simulation.device.captures, simulation.device.launches) == (1, 7)


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
    # step by step at first, of which the first is no launch; then one launch for all three
    assert (simulation.device.captures, simulation.device.launches) == (2, 2 + 3)


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
    assert simulation.device.launches == launches + 1


def test_loops_and_single_steps_may_alternate(bundle: Bundle) -> None:
    """Each finds at the places what it needs, whatever the other left there."""
    engine = Simulation(bundle).engine
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
    simulation = Simulation(bundle)
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
    simulation = Simulation(bundle)
    engine, device = simulation.engine, simulation.device
    for _ in range(3):
        launches = device.launches
        engine.run_steps(DENOISE, *loop(bundle, engine, 4), FEEDBACK)
    assert (device.captures, device.launches) == (1, launches + 4)


def test_loops_do_not_pile_up(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.tensorrt.capture.MOST_CALLS", 3)
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


def test_nothing_is_allocated_after_warm_up(bundle: Bundle) -> None:
    simulation = Simulation(bundle)
    simulation.painter.paint()
    allocations, contexts = simulation.device.allocations, simulation.plans.contexts
    simulation.painter.paint(seed=50)
    assert allocations == 2  # the arena and the staging memory
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


def test_groups_are_swapped_and_change_nothing(bundle: Bundle, expected_pictures: np.ndarray) -> None:
    plan = memory_plan(bundle)
    tight = memory_plan(bundle, plan.total - plan.cache - 1)
    assert tight.groups == ((CONTROL, DENOISE, DECODE), (ID_ENCODER,))
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
    assert simulation.device.allocations == 2 + len(GRAPHS)


def test_many_shapes_do_not_pile_up(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.tensorrt.capture.MOST_CALLS", 3)
    engine, control = Simulation(bundle).engine, bundle.manifest.specs[CONTROL]
    for maps in range(1, 1 + bundle.manifest.largest_sizes["maps"]):
        for _ in range(2):
            engine.run(CONTROL, {t.name: np.ones(t.resolve({"maps": maps}), t.dtype) for t in control.inputs})
    assert engine.cached_calls == 3


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
    engine = Simulation(bundle).engine
    first, second = np.arange(12, dtype=np.float16).reshape(4, 3), np.ones((2, 3), np.float16)
    joined = engine.concatenate([(engine.to_device(first), 1, 3), (engine.to_device(second), 0, 1)])
    np.testing.assert_array_equal(engine.to_host(joined), [*first[1:3], second[0]])


# --- names, and who watches -------------------------------------------------------------------------------


def renamed(bundle: Bundle) -> Bundle:
    """The bundle with other names for all inputs and outputs of its graphs than the files have."""

    def rename(spec: GraphSpec) -> GraphSpec:
        inputs, outputs = (
            tuple(replace(of, name=f"our {of.name}", file_name=of.name) for of in tensors)
            for tensors in (spec.inputs, spec.outputs)
        )
        per_step = tuple(f"our {name}" for name in spec.per_step)
        return replace(spec, inputs=inputs, outputs=outputs, per_step=per_step)

    graphs = {
        name: replace(record, spec=rename(record.spec)) for name, record in bundle.manifest.graphs.items()
    }
    return Bundle(bundle.path, replace(bundle.manifest, graphs=graphs))


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
    """Several steps in one launch are one run."""
    engine = Simulation(bundle).engine
    inputs, per_step = loop(bundle, engine, 2)
    seen: list[tuple[str, str, Sequence[int]]] = []

    def observe(action: str, graph: str, given: Mapping[str, Any]) -> AbstractContextManager[object]:
        seen.append((action, graph, given["timestep"].shape if given else ()))
        return nullcontext()

    engine.observer = observe
    for _ in range(2):
        engine.run_steps(DENOISE, inputs, per_step, FEEDBACK)
    one_step = ("run", DENOISE, (1,))
    assert seen == [("load", DENOISE, ()), one_step, one_step, ("run", DENOISE, (2, 1))]

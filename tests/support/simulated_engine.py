"""A card engine with plans on a simulated card, and what takes samples through its graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from engines.backends.onnxruntime.cuda import Sessions, SharedStream, register
from engines.backends.onnxruntime.provider_memory import ProviderMemory
from engines.bundle import Bundle
from engines.card.engine import CardEngine
from engines.card.tensors import DeviceArray
from engines.cuda import OutOfDeviceMemoryError
from engines.engine import DeviceTensor, Engine, open_engine
from engines.memory_plan import DeviceMemoryPlan, needed_device_bytes, plan_device_memory
from engines.options import EngineOptions
from engines.spec import GraphSpec
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ENCODE, ID_ENCODER
from tests.support.simulated_card import SimulatedDevice, SimulatedPlans
from tests.support.simulated_provider import SimulatedLibrary

# the decoder needs far more than the others, and so what the denoise graph has in place lies in its way
SCRATCH = {DENOISE: 2 << 20, CONTROL: 1 << 20, ENCODE: 1 << 20, DECODE: 24 << 20, ID_ENCODER: 1 << 20}
CACHE = 8 << 20
WEIGHTS = {DENOISE: 40, CONTROL: 30, ENCODE: 5, DECODE: 10, ID_ENCODER: 20}


def memory_plan(
    bundle: Bundle,
    budget: int | None = None,
    scratch: Mapping[str, int] = SCRATCH,
    backend: str = "tensorrt",
) -> DeviceMemoryPlan:
    """The plan for graphs of these sizes with a backend; its cache is small if no budget is given."""
    graphs = {
        name: replace(
            record,
            files=(replace(record.files[0], bytes=WEIGHTS[name] << 20),),
            scratch_bytes={"tensorrt": scratch[name], "cuda": scratch[name]},
        )
        for name, record in bundle.manifest.graphs.items()
    }
    manifest = replace(bundle.manifest, graphs=graphs, backend=backend)
    if budget is None:
        budget = needed_device_bytes(manifest) + CACHE
    return plan_device_memory(manifest, budget)


class Simulation:
    """A card engine with plans on a simulated card."""

    def __init__(
        self,
        bundle: Bundle,
        plan: DeviceMemoryPlan | None = None,
        scratch: Mapping[str, int] = SCRATCH,
        window: int = 1,
        capture: bool = True,
    ) -> None:
        self.device = SimulatedDevice()
        self.plans = SimulatedPlans(bundle, self.device, scratch)
        plan = plan or memory_plan(bundle)
        self.engine = CardEngine("tensorrt", bundle, self.device, self.plans.open_plan, plan, capture)  # type: ignore[arg-type]
        self.painter = Painter(bundle, self.engine, window)


class ProviderSimulation:
    """A card engine with sessions of ONNX Runtime's CUDA provider on a simulated card."""

    def __init__(
        self,
        bundle: Bundle,
        plan: DeviceMemoryPlan | None = None,
        window: int = 1,
        options: EngineOptions = EngineOptions(),
        beside: ProviderSimulation | None = None,
    ) -> None:
        """`beside`: another engine of the same process."""
        self.device = beside.device if beside else SimulatedDevice()
        self.library = beside.library if beside else SimulatedLibrary(bundle, self.device)
        self.shared = beside.shared if beside else SharedStream()
        if not beside:
            self.shared.memory = ProviderMemory(self.device)
            register(self.library, self.shared.memory)
        self.plan = plan or memory_plan(bundle, backend="onnxruntime")
        self.sessions = Sessions(self.library, bundle, self.shared, self.device.stream, self.plan, options)
        self.engine = CardEngine(
            "onnxruntime",
            bundle,
            self.device,  # type: ignore[arg-type]
            self.sessions.open_graph,
            self.plan,
            options.cuda_graphs,
            self.shared.lock,
        )
        self.painter = Painter(bundle, self.engine, window)


def fill(engine: CardEngine) -> list[DeviceArray]:
    """Takes all memory for tensors."""
    kept = []
    for nbytes in (1 << 20, 1 << 8):
        with suppress(OutOfDeviceMemoryError):
            while True:
                kept.append(engine.to_device(np.zeros(nbytes, np.uint8)))
    return kept


class Painter:
    """Takes samples through all graphs, as the runtime does. What it needs follows from numbers."""

    def __init__(self, bundle: Bundle, engine: Engine, window: int = 1) -> None:
        self._bundle = bundle
        self._engine = engine
        self._window = window
        self._tokens: dict[int, tuple[np.ndarray, DeviceTensor]] = {}
        self._nothing: dict[int, DeviceTensor] = {}
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
        tokens, tokens_on_device = self._tokens_of(reference)
        latent: Any = self._engine.to_device(rng.standard_normal(shape, np.float32))
        if samples not in self._nothing:
            self._nothing[samples] = self._engine.to_device(np.zeros(shape, np.float32))
        carry: Any = self._nothing[samples]
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
                inputs = {"latent": latent, "carry": carry, "tokens": tokens_on_device, **maps}
                if at_once:
                    per_step = {name: np.stack([n[name] for n in numbers]) for name in numbers[0]}
                    results = self._engine.run_steps(DENOISE, inputs, per_step, feedback)
                else:
                    results = self._engine.run(DENOISE, inputs | numbers_at_once[0])
                latent, carry = results["next_latent"], results["epsilon"] if multistep else carry
        return np.concatenate([self._decode(latent, sample) for sample in range(samples)])

    def _tokens_of(self, reference: int) -> tuple[np.ndarray, DeviceTensor]:
        """(2, T, D) tokens of a reference and of none, here and on the device."""
        if reference not in self._tokens:
            (spec,) = self._bundle.manifest.specs[ID_ENCODER].inputs
            picture = np.random.default_rng([1, reference]).random(spec.resolve({"samples": 1}), np.float32)
            tokens = self._engine.run(ID_ENCODER, {"reference": picture})["tokens"]
            unconditional = self._bundle.constants()["unconditional_tokens"]
            both = np.concatenate([self._engine.to_host(tokens), unconditional])
            self._tokens[reference] = both, self._engine.to_device(both)
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
                inputs |= {
                    "timestep": np.repeat(of_steps, 2),
                    "tokens": np.tile(tokens, (len(of_steps), 1, 1)),
                }
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


def renamed(bundle: Bundle) -> Bundle:
    """The bundle with other names for all inputs and outputs of its graphs than the files have."""

    def rename(spec: GraphSpec) -> GraphSpec:
        inputs, outputs = (
            tuple(replace(of, name=f"our {of.name}", file_name=of.name) for of in tensors)
            for tensors in (spec.inputs, spec.outputs)
        )
        per_step = tuple(f"our {name}" for name in spec.per_step)
        banks = tuple(
            replace(bank, tensors=tuple(f"our {name}" for name in bank.tensors), index=f"our {bank.index}")
            for bank in spec.banks
        )
        return replace(spec, inputs=inputs, outputs=outputs, per_step=per_step, banks=banks)

    graphs = {
        name: replace(record, spec=rename(record.spec)) for name, record in bundle.manifest.graphs.items()
    }
    return Bundle(bundle.path, replace(bundle.manifest, graphs=graphs))

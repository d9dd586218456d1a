"""Samples latents from noise to picture, with one call of the step graph per step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.engine import Array, DeviceTensor, Engine
from engines.spec import BankSpec, GraphSpec
from runtime.diffusion.ddim import Schedule, predicted_clean_latent
from runtime.parameters import SamplingParameters
from runtime.sampling.conditions import BankRows, Conditions

LATENT, CARRY = "latent", "carry"
"""Inputs of every step graph: the latent, and noise or what the sampler keeps of the step before."""

START_NOISE = "start_noise"
"""Input of step graphs that blend the latent with a background: the sample's first latent."""

NEXT_LATENT, EPSILON = "next_latent", "epsilon"
"""Its outputs."""


@dataclass(frozen=True, eq=False)
class StepOfSample:
    """What one sample needs for its next step. Samples in a call may be at different steps."""

    timestep: int
    coefficients: NDArray[np.float32]
    """(3,), see `runtime.diffusion.ddim` and `runtime.diffusion.samplers`."""
    background_coefficients: NDArray[np.float32]
    """(2,), see `runtime.diffusion.ddim`."""
    sampling: SamplingParameters
    conditional: Mapping[str, int]
    """Bank -> its row for the conditional half."""
    unconditional: Mapping[str, int] | None
    """The same for the unconditional half; None if the step has no guidance."""


def step_inputs(samples: Sequence[StepOfSample], spec: GraphSpec) -> dict[str, Array]:
    """Returns the inputs of the step graph that change at every step: what each sample is, and which rows it
    needs.

    The conditional halves come first, one row per sample; then the unconditional halves of those samples
    that have guidance. An input that is none of the sampler's own is a parameter, like `guidance_scale`.
    """
    rows = [(i, sample.conditional) for i, sample in enumerate(samples)]
    unconditional_row = list(range(len(samples)))
    for i, sample in enumerate(samples):
        if sample.unconditional is not None:
            unconditional_row[i] = len(rows)
            rows.append((i, sample.unconditional))
    inputs: dict[str, Array] = {
        "timestep": np.array([sample.timestep for sample in samples], np.float32),
        "coefficients": np.stack([sample.coefficients for sample in samples]),
        "background_coefficients": np.stack([sample.background_coefficients for sample in samples]),
        "conditional_row": np.arange(len(samples), dtype=np.int32),
        "unconditional_row": np.array(unconditional_row, np.int32),
        "row_sample": np.array([i for i, _ in rows], np.int32),
    }
    for bank in spec.banks:
        inputs[bank.index] = np.array([of_banks[bank.name] for _, of_banks in rows], np.int32)
    for name in spec.per_step:
        if name not in inputs:
            inputs[name] = np.array([getattr(sample.sampling, name) for sample in samples], np.float32)
    return {name: inputs[name] for name in spec.per_step}


def guided_steps(sampling: SamplingParameters, schedule: Schedule) -> list[bool]:
    """For every step, whether the unconditional half is needed."""
    return [sampling.guided_at(timestep) for timestep in schedule.timesteps.tolist()]


@dataclass(frozen=True, eq=False)
class LatentRow:
    """One row of latents, or of tensors of their shape, on the device."""

    tensor: DeviceTensor
    """(N, C, h, w)."""
    row: int
    rows: int
    """N."""


@dataclass(eq=False)
class Sample:
    """One picture in the making, on its way from noise to latent. It may share calls with any others."""

    conditions: Conditions
    schedule: Schedule
    sampling: SamplingParameters
    latent: LatentRow
    """Position of its latent; noise before the first step."""
    generator: np.random.Generator | None = None
    """For the noise of steps with eta > 0: its own, so that its batch-mates do not matter."""
    epsilon: LatentRow | None = None
    """The epsilon of the step before, if the next one needs it."""
    step: int = 0
    """Steps done."""
    error: Exception | None = None
    """Why it cannot go on."""
    wants_clean_latent: bool = False
    """Asks the next step for `clean_latent`."""
    clean_latent: NDArray[np.float32] | None = None
    """(C, h, w), what the latent would be without noise, as far as the last step could tell."""
    start_noise: LatentRow | None = field(default=None, init=False)
    """Its first latent, if the step graph needs it."""
    _noise: NDArray[np.float32] | None = field(default=None, init=False)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self.schedule.steps

    @property
    def is_last_step(self) -> bool:
        """Whether the step to come is the last."""
        return self.step + 1 == self.schedule.steps

    @property
    def is_guided(self) -> bool:
        """Whether the step to come has guidance."""
        return self.sampling.guided_at(int(self.schedule.timesteps[self.step]))

    @property
    def has_banks(self) -> bool:
        """Whether the banks of the step to come are in the tensors of the step before: none has to be
        computed."""
        return self.step > 0 and self.conditions.steps_ready(self.step - 1) > 1

    @property
    def steps_alike(self) -> int:
        """How many steps to come differ in a few numbers only: they have the same rows, their banks are ready
        together, and nothing comes in or goes out between them."""
        if self.wants_clean_latent or self.sampling.eta > 0:
            return 1
        ready = self.conditions.steps_ready(self.step)
        guided = guided_steps(self.sampling, self.schedule)[self.step : self.step + ready]
        return len(list(itertools.takewhile(lambda step: step == guided[0], guided)))

    def keeps_epsilon(self, steps: int) -> bool:
        """Returns whether the step after so many needs what the last of them predicts."""
        return self.schedule.multistep and self.step + steps < self.schedule.steps

    def noise(self, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        """Returns the noise of the step to come, None if it adds none; the same until that step is taken."""
        if self._noise is None and self.sampling.eta > 0 and self.generator is not None:
            self._noise = self.generator.standard_normal(shape, dtype=np.float32)
        return self._noise

    def advance(self, steps: int, latent: LatentRow, epsilon: LatentRow | None) -> None:
        """Takes note that steps were taken, and of what the last one predicted, if it was asked for."""
        self.latent = latent
        self.epsilon = epsilon if self.keeps_epsilon(steps) else None
        self.step += steps
        self._noise = None


@dataclass(frozen=True)
class StepCall:
    """A call of the step graph, for those who measure."""

    began: float
    """`time.perf_counter()` when the engine was called; a CPU's engine had computed all banks by then."""
    samples: int
    """Number of samples that shared it."""
    guided: bool
    """Whether one of them had guidance."""
    has_banks: bool
    """Whether no bank had to be computed for it."""


class RunningBatch:
    """Samples that take their steps together, each at its own step and settings: in one call of the step
    graph, or in as few as the device makes good use of.

    Samples may be added to `samples` and removed from it between any two steps.
    """

    def __init__(self, engine: Engine, spec: GraphSpec, samples_per_call: int | None = None) -> None:
        """Starts empty.

        Args:
            engine: runs the graphs.
            spec: signature of the step graph.
            samples_per_call: most samples in one call of the step graph; all if None.
        """
        self.samples_per_call = samples_per_call
        self.samples: list[Sample] = []
        self.last_call: StepCall
        """The last call of the step graph; none before the first step."""
        self._engine = engine
        self._spec = spec
        self._shape: tuple[int, ...] = spec.tensor(LATENT).resolve({"samples": 1})[1:]
        self._needs_start_noise = START_NOISE in {tensor.name for tensor in spec.inputs}
        self._no_carry: dict[int, DeviceTensor] = {}
        self._from_host: dict[str, tuple[list[BankRows], Mapping[str, DeviceTensor]]] = {}
        """Bank -> rows that came from the host, and where they are on the device."""

    def steps_alike(self) -> int:
        """Returns how many steps `step` can take at once; one if the samples are at different ones."""
        first = self.samples[0]
        together = all(
            sample.conditions is first.conditions and sample.step == first.step for sample in self.samples
        )
        return min(sample.steps_alike for sample in self.samples) if together else 1

    def step(self, steps: int = 1) -> None:
        """Takes a step with all samples, or several.

        If a call fails, each of its samples takes them alone, and those that fail again get their `error`:
        what is wrong with one sample, or too much for all of them together, does not hurt the others.

        Args:
            steps: how many to take, at most `steps_alike`.
        """
        count = self.samples_per_call or len(self.samples)
        for start in range(0, len(self.samples), count):
            self._call(self.samples[start : start + count], steps)

    def _call(self, samples: Sequence[Sample], steps: int) -> None:
        try:
            self._advance(samples, steps)
        except Exception as error:
            if len(samples) == 1:
                samples[0].error = error
                return
            for sample in samples:
                try:
                    self._advance([sample], steps)
                except Exception as own_error:
                    sample.error = own_error

    def latents(self, samples: Sequence[Sample]) -> DeviceTensor:
        """Returns (N, C, h, w) latents of some samples, together on the device."""
        return self._gather([sample.latent for sample in samples])

    def _gather(self, rows: Sequence[LatentRow]) -> DeviceTensor:
        """Returns (N, C, h, w) of rows that may lie anywhere; without a copy if they are all rows of one
        tensor."""
        first = rows[0]
        if [row.row for row in rows] == list(range(first.rows)) and all(
            row.tensor is first.tensor for row in rows
        ):
            return first.tensor
        return self._engine.concatenate([(row.tensor, row.row, row.row + 1) for row in rows])

    def _advance(self, samples: Sequence[Sample], steps: int) -> None:
        spec = self._spec
        has_banks = all(sample.has_banks for sample in samples)
        here = self._banks(samples)
        gathered = {bank.name: self._gather_bank(bank, [of[bank.name] for of in here]) for bank in spec.banks}
        rows = [{name: of[index] for name, (_, of) in gathered.items()} for index in range(len(samples))]
        latents = self.latents(samples)
        wants_clean_latents = any(sample.wants_clean_latent for sample in samples)
        wants_epsilon = wants_clean_latents or any(sample.keeps_epsilon(steps) for sample in samples)
        names = [NEXT_LATENT, EPSILON] if wants_epsilon else [NEXT_LATENT]
        inputs: dict[str, DeviceTensor | Array] = {LATENT: latents, CARRY: self._carry(samples)}
        if self._needs_start_noise:
            inputs[START_NOISE] = self._start_noise(samples)
        for tensors, _ in gathered.values():
            inputs |= tensors
        numbers = [
            step_inputs([_step_of_sample(*of, ahead) for of in zip(samples, here, rows)], spec)
            for ahead in range(steps)
        ]
        guided = any(sample.is_guided for sample in samples)
        self.last_call = StepCall(time.perf_counter(), len(samples), guided, has_banks)
        if steps == 1:
            outputs = self._engine.run(spec.name, inputs | numbers[0], names)
        else:
            per_step = {name: np.stack([of_step[name] for of_step in numbers]) for name in spec.per_step}
            multistep = samples[0].schedule.multistep
            feedback = {into: of for into, of in spec.feedback.items() if multistep or into != CARRY}
            outputs = self._engine.run_steps(spec.name, inputs, per_step, feedback, names)
        if wants_clean_latents:
            self._predict_clean_latents(samples, latents, outputs[EPSILON])
        for row, sample in enumerate(samples):
            epsilon = LatentRow(outputs[EPSILON], row, len(samples)) if wants_epsilon else None
            sample.advance(steps, LatentRow(outputs[NEXT_LATENT], row, len(samples)), epsilon)

    def _banks(self, samples: Sequence[Sample]) -> list[Mapping[str, BankRows]]:
        """Returns the banks of each sample; samples of one placement at one step share theirs."""
        by_step = {(id(sample.conditions), sample.step): sample for sample in samples}
        banks = {key: sample.conditions.banks(sample.step) for key, sample in by_step.items()}
        return [banks[id(sample.conditions), sample.step] for sample in samples]

    def _gather_bank(
        self, bank: BankSpec, rows: Sequence[BankRows]
    ) -> tuple[Mapping[str, DeviceTensor | Array], list[int]]:
        """Returns a bank for one call, and the conditional row of each sample in it.

        Rows that lie in one tensor are taken as they are, others are brought together. What comes from the
        host is sent to the device when it changes.

        Args:
            bank: which one.
            rows: of each sample.
        """
        # different requests for one placement may have the same rows
        distinct = {_place(of): of for of in rows}
        counts = [of.count for of in distinct.values()]
        first = dict(zip(distinct, itertools.accumulate([0, *counts])))
        of_samples = [first[_place(of)] for of in rows]
        if rows[0].on_host:
            return self._send_bank(bank, list(distinct.values())), of_samples
        if len(distinct) == 1:
            return rows[0].tensors, [of.conditional for of in rows]
        return {
            name: self._engine.concatenate(
                [(of.tensors[name], of.conditional, of.unconditional + 1) for of in distinct.values()]
            )
            for name in bank.tensors
        }, of_samples

    def _send_bank(self, bank: BankSpec, rows: list[BankRows]) -> Mapping[str, DeviceTensor]:
        known, tensors = self._from_host.get(bank.name, ([], {}))
        if [_place(of) for of in known] != [_place(of) for of in rows]:
            pieces = {
                name: [of.tensors[name][of.conditional : of.unconditional + 1] for of in rows]
                for name in bank.tensors
            }
            tensors = {name: self._engine.to_device(np.concatenate(of)) for name, of in pieces.items()}
            self._from_host[bank.name] = (rows, tensors)
        return tensors

    def _carry(self, samples: Sequence[Sample]) -> DeviceTensor:
        """Returns what a step adds beside latent and epsilon: noise, the epsilon of the step before, or
        nothing."""
        count = len(samples)
        if count not in self._no_carry:
            self._no_carry[count] = self._engine.to_device(np.zeros((count, *self._shape), np.float32))
        rows = []
        for row, sample in enumerate(samples):
            noise = sample.noise(self._shape)
            if noise is not None:
                rows.append(LatentRow(self._engine.to_device(noise[None]), 0, 1))
            else:
                rows.append(sample.epsilon or LatentRow(self._no_carry[count], row, count))
        return self._gather(rows)

    def _start_noise(self, samples: Sequence[Sample]) -> DeviceTensor:
        """Returns the first latents; the next step of the same samples finds them together."""
        noise = self._gather([sample.start_noise or sample.latent for sample in samples])
        for row, sample in enumerate(samples):
            sample.start_noise = LatentRow(noise, row, len(samples))
        return noise

    def _predict_clean_latents(
        self, samples: Sequence[Sample], latents: DeviceTensor, epsilon: DeviceTensor
    ) -> None:
        before, predicted = self._engine.to_host(latents), self._engine.to_host(epsilon)
        for row, sample in enumerate(samples):
            if sample.wants_clean_latent:
                alpha = float(sample.schedule.alphas[sample.step])
                sample.clean_latent = predicted_clean_latent(before[row], predicted[row], alpha)
                sample.wants_clean_latent = False


def _place(rows: BankRows) -> tuple[int, int]:
    """Tells the rows of one bank apart."""
    return id(rows.tensors), rows.conditional


def _step_of_sample(
    sample: Sample, here: Mapping[str, BankRows], rows: Mapping[str, int], ahead: int
) -> StepOfSample:
    """Returns the step to come, or one that is further ahead and has its banks in the same tensors.

    Args:
        sample: which one.
        here: its banks at the step to come.
        rows: bank -> the row of the call's tensors where its conditional half is.
        ahead: steps further ahead.
    """
    step = sample.step + ahead
    there = sample.conditions.banks(step) if ahead else here
    conditional = {name: row + there[name].conditional - here[name].conditional for name, row in rows.items()}
    unconditional = {name: row + there[name].count - 1 for name, row in conditional.items()}
    timestep = int(sample.schedule.timesteps[step])
    # where both halves are the same, guidance leads nowhere
    guided = sample.sampling.guided_at(timestep) and unconditional != conditional
    return StepOfSample(
        timestep=timestep,
        coefficients=sample.schedule.coefficients[step],
        background_coefficients=sample.schedule.background_coefficients[step],
        sampling=sample.sampling,
        conditional=conditional,
        unconditional=unconditional if guided else None,
    )

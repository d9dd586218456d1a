"""Sampling: takes latents from noise to picture, one call of the denoise graph per step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.engine import Array, DeviceTensor, Engine
from engines.spec import DENOISE, STEP_INPUTS
from runtime.diffusion.ddim import Schedule, predicted_clean_latent
from runtime.request import Sampling
from runtime.sampling.detail_maps import DetailMaps


@dataclass(frozen=True, eq=False)
class StepOfSample:
    """What one sample needs for its next step. Samples in a call may be at different steps."""

    timestep: int
    coefficients: NDArray[np.float32]
    """(3,), see `runtime.diffusion.ddim` and `runtime.diffusion.samplers`."""
    guidance_scale: float
    control_scale: float
    conditional: tuple[int, int]
    """Index of the ID tokens, and of the detail maps, for the conditional half."""
    unconditional: tuple[int, int] | None
    """The same for the unconditional half; None if the step has no guidance."""


def step_inputs(samples: Sequence[StepOfSample]) -> dict[str, Array]:
    """The inputs of the denoise graph that say what each sample is and where its conditions are.

    The conditional halves come first, one row per sample; then the unconditional halves of those samples
    that have guidance.
    """
    rows = [(i, *sample.conditional) for i, sample in enumerate(samples)]
    unconditional_row = list(range(len(samples)))
    for i, sample in enumerate(samples):
        if sample.unconditional is not None:
            unconditional_row[i] = len(rows)
            rows.append((i, *sample.unconditional))
    row_sample, row_condition, row_map = np.array(rows, np.int32).T
    return {
        "timestep": np.array([sample.timestep for sample in samples], np.float32),
        "guidance_scale": np.array([sample.guidance_scale for sample in samples], np.float32),
        "control_scale": np.array([sample.control_scale for sample in samples], np.float32),
        "coefficients": np.stack([sample.coefficients for sample in samples]),
        "conditional_row": np.arange(len(samples), dtype=np.int32),
        "unconditional_row": np.array(unconditional_row, np.int32),
        "row_sample": row_sample,
        "row_condition": row_condition,
        "row_map": row_map,
    }


def guided_steps(sampling: Sampling, schedule: Schedule) -> list[bool]:
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


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the samples of one placement have in common."""

    maps: DetailMaps
    tokens: NDArray[np.float32]
    """(1, T, D) without guidance; (2, T, D) with it, the unconditional ones last."""


@dataclass(eq=False)
class Sample:
    """One picture in the making, on its way from noise to latent. It may share calls with any others."""

    conditions: Conditions
    schedule: Schedule
    sampling: Sampling
    latent: LatentRow
    """Where its latent is; noise before the first step."""
    generator: np.random.Generator | None = None
    """For the noise of steps with eta > 0: its own, so that its batch-mates do not matter."""
    epsilon: LatentRow | None = None
    """What the step before predicted, if the next one needs it."""
    step: int = 0
    """Steps done."""
    error: Exception | None = None
    """Why it cannot go on."""
    wants_clean_latent: bool = False
    """Asks the next step for `clean_latent`."""
    clean_latent: NDArray[np.float32] | None = None
    """(C, h, w), what the latent would be without noise, as far as the last step could tell."""
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
    def steps_alike(self) -> int:
        """How many steps to come differ in a few numbers only: they have the same rows, their detail maps are
        at hand together, and nothing comes in or goes out between them."""
        if self.wants_clean_latent or self.sampling.eta > 0:
            return 1
        at_hand = self.conditions.maps.steps_at_hand(self.step)
        guided = guided_steps(self.sampling, self.schedule)[self.step : self.step + at_hand]
        return len(list(itertools.takewhile(lambda step: step == guided[0], guided)))

    def keeps_epsilon(self, steps: int) -> bool:
        """Whether the step after so many needs what the last of them predicts."""
        return self.schedule.multistep and self.step + steps < self.schedule.steps

    def noise(self, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        """The noise of the step to come, None if it adds none; the same until that step is taken."""
        if self._noise is None and self.sampling.eta > 0 and self.generator is not None:
            self._noise = self.generator.standard_normal(shape, dtype=np.float32)
        return self._noise

    def advance(self, steps: int, latent: LatentRow, epsilon: LatentRow | None) -> None:
        """Takes note that steps were taken, and of what the last one predicted, if it was asked for."""
        self.latent = latent
        self.epsilon = epsilon if self.keeps_epsilon(steps) else None
        self.step += steps
        self._noise = None


class RunningBatch:
    """Samples that take their steps together, each at its own step and settings: in one call of the denoise
    graph, or in as few as the device makes good use of.

    Samples may be added to `samples` and removed from it between any two steps.
    """

    def __init__(
        self, engine: Engine, latent_shape: tuple[int, int, int], samples_per_call: int | None = None
    ) -> None:
        """Starts empty.

        Args:
            engine: runs the graphs.
            latent_shape: (C, h, w).
            samples_per_call: most samples in one call of the denoise graph; all if None.
        """
        self.samples_per_call = samples_per_call
        self.samples: list[Sample] = []
        self._engine = engine
        self._shape = latent_shape
        self._no_noise: dict[int, DeviceTensor] = {}
        self._tokens: tuple[list[NDArray[np.float32]], DeviceTensor] = ([], None)

    def steps_alike(self) -> int:
        """How many steps `step` can take at once; one if the samples are at different ones."""
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
        """(N, C, h, w) latents of some samples, together on the device."""
        return self._gather([sample.latent for sample in samples])

    def _gather(self, rows: Sequence[LatentRow]) -> DeviceTensor:
        """(N, C, h, w) of rows that may lie anywhere; without a copy if they are all rows of one tensor."""
        first = rows[0]
        if [row.row for row in rows] == list(range(first.rows)) and all(
            row.tensor is first.tensor for row in rows
        ):
            return first.tensor
        return self._engine.concatenate([(row.tensor, row.row, row.row + 1) for row in rows])

    def _advance(self, samples: Sequence[Sample], steps: int) -> None:
        tensors, map_rows = self._maps(samples)
        tokens, token_rows = self._condition_tokens(samples)
        latents = self.latents(samples)
        wants_clean_latents = any(sample.wants_clean_latent for sample in samples)
        wants_epsilon = wants_clean_latents or any(sample.keeps_epsilon(steps) for sample in samples)
        names = ["next_latent", "epsilon"] if wants_epsilon else ["next_latent"]
        inputs = {"latent": latents, "carry": self._carry(samples), "tokens": tokens, **tensors}
        numbers = [
            step_inputs([_step_of_sample(*of, ahead) for of in zip(samples, token_rows, map_rows)])
            for ahead in range(steps)
        ]
        if steps == 1:
            outputs = self._engine.run(DENOISE, inputs | numbers[0], names)
        else:
            per_step = {name: np.stack([of_step[name] for of_step in numbers]) for name in STEP_INPUTS}
            feedback = {"latent": "next_latent"}
            if samples[0].schedule.multistep:
                feedback["carry"] = "epsilon"
            outputs = self._engine.run_steps(DENOISE, inputs, per_step, feedback, names)
        if wants_clean_latents:
            self._predict_clean_latents(samples, latents, outputs["epsilon"])
        for row, sample in enumerate(samples):
            epsilon = LatentRow(outputs["epsilon"], row, len(samples)) if wants_epsilon else None
            sample.advance(steps, LatentRow(outputs["next_latent"], row, len(samples)), epsilon)

    def _maps(self, samples: Sequence[Sample]) -> tuple[Mapping[str, DeviceTensor], list[int]]:
        """Detail maps for one call, and the first row of each sample."""
        by_step = {(id(sample.conditions.maps), sample.step): sample for sample in samples}
        here = {key: sample.conditions.maps.at(sample.step) for key, sample in by_step.items()}
        # different requests for one placement have the same maps from the cache
        distinct = {(id(maps.tensors), maps.conditional): maps for maps in here.values()}
        of_samples = [here[id(sample.conditions.maps), sample.step] for sample in samples]
        if len(distinct) == 1:
            return of_samples[0].tensors, [maps.conditional for maps in of_samples]
        tensors = {
            name: self._engine.concatenate(
                [(maps.tensors[name], maps.conditional, maps.unconditional + 1) for maps in distinct.values()]
            )
            for name in of_samples[0].tensors
        }
        counts = [maps.unconditional + 1 - maps.conditional for maps in distinct.values()]
        first = dict(zip(distinct, itertools.accumulate([0, *counts])))
        return tensors, [first[id(maps.tensors), maps.conditional] for maps in of_samples]

    def _condition_tokens(self, samples: Sequence[Sample]) -> tuple[DeviceTensor, list[int]]:
        """ID tokens for one call, and the first row of each sample; sent to the device when they change."""
        distinct = list(
            {id(sample.conditions.tokens): sample.conditions.tokens for sample in samples}.values()
        )
        known, tensor = self._tokens
        if [id(tokens) for tokens in known] != [id(tokens) for tokens in distinct]:
            tensor = self._engine.to_device(np.concatenate(distinct))
            self._tokens = (distinct, tensor)
        first = dict(zip(map(id, distinct), itertools.accumulate([0, *(len(tokens) for tokens in distinct)])))
        return tensor, [first[id(sample.conditions.tokens)] for sample in samples]

    def _carry(self, samples: Sequence[Sample]) -> DeviceTensor:
        """What a step adds beside latent and epsilon: noise, the epsilon of the step before, or nothing."""
        count = len(samples)
        if count not in self._no_noise:
            self._no_noise[count] = self._engine.to_device(np.zeros((count, *self._shape), np.float32))
        rows = []
        for row, sample in enumerate(samples):
            noise = sample.noise(self._shape)
            if noise is not None:
                rows.append(LatentRow(self._engine.to_device(noise[None]), 0, 1))
            else:
                rows.append(sample.epsilon or LatentRow(self._no_noise[count], row, count))
        return self._gather(rows)

    def _predict_clean_latents(
        self, samples: Sequence[Sample], latents: DeviceTensor, epsilon: DeviceTensor
    ) -> None:
        before, predicted = self._engine.to_host(latents), self._engine.to_host(epsilon)
        for row, sample in enumerate(samples):
            if sample.wants_clean_latent:
                alpha = float(sample.schedule.alphas[sample.step])
                sample.clean_latent = predicted_clean_latent(before[row], predicted[row], alpha)
                sample.wants_clean_latent = False


def sample(
    engine: Engine,
    maps: DetailMaps,
    tokens: NDArray[np.float32],
    schedule: Schedule,
    sampling: Sampling,
    latents: NDArray[np.float32],
    generators: Sequence[np.random.Generator] = (),
) -> Iterator[DeviceTensor]:
    """Takes samples of one placement through all steps, and stops between them.

    Args:
        engine: runs the denoise graph.
        maps: the placement's detail maps.
        tokens: (1, T, D) without guidance; (2, T, D) with it, the unconditional ones last.
        schedule: timesteps and coefficients.
        sampling: guidance, strength and eta.
        latents: (N, C, h, w) noise to start from.
        generators: one per sample, for the noise of steps with eta > 0.

    Yields:
        After every step, the (N, C, h, w) latents on the device.
    """
    batch = RunningBatch(engine, latents.shape[1:])
    start = engine.to_device(latents)
    conditions = Conditions(maps, tokens)
    batch.samples = [
        Sample(conditions, schedule, sampling, LatentRow(start, row, len(latents)), generator)
        for row, generator in itertools.zip_longest(range(len(latents)), generators)
    ]
    for _ in range(schedule.steps):
        batch.step()
        for error in (sample.error for sample in batch.samples if sample.error):
            raise error
        yield batch.latents(batch.samples)


def _step_of_sample(sample: Sample, token_row: int, map_row: int, ahead: int) -> StepOfSample:
    """The step to come, or one that is further ahead and has its maps in the same tensors."""
    step, maps = sample.step + ahead, sample.conditions.maps
    if ahead:  # only then are the maps at hand: another sample of the placement may be at another step
        map_row += maps.at(step).conditional - maps.at(sample.step).conditional
    timestep = int(sample.schedule.timesteps[step])
    return StepOfSample(
        timestep=timestep,
        coefficients=sample.schedule.coefficients[step],
        guidance_scale=sample.sampling.guidance_scale,
        control_scale=sample.sampling.control_scale,
        conditional=(token_row, map_row),
        unconditional=(token_row + 1, map_row + 1) if sample.sampling.guided_at(timestep) else None,
    )

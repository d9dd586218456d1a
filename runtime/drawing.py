"""Draws the pictures of jobs, from a prepared placement to the decoded picture.

The part of a request's life cycle that needs the engine. `Compositor.run` and the server's batcher both use
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engines.engine import DeviceTensor
from runtime.job import ImageJob
from runtime.result import Stopwatch
from runtime.sampling.conditions import OWNER
from runtime.sampling.running_batch import LatentRow, RunningBatch, Sample, StepCall
from runtime.systems.system import Model, System

_FILLS_A_CPU = 32 * 32
"""Cells of a latent from which on one sample keeps a CPU busy: more in a call cost more than they share, in
time and in memory (docs/studies/samples-per-call.md)."""

Picture = NDArray[np.uint8]
"""(R, R, 3) RGB, as the networks draw it."""

Drawn = Callable[[], Picture]
"""Gives a picture that was put to the engine, and waits until it is drawn. For one call, from any thread."""


class Drawing:
    """The pictures that share the engine, each at its own step."""

    def __init__(self, model: Model, system: System) -> None:
        """Starts empty."""
        self.running: dict[Sample, ImageJob] = {}
        self._engine = model.engine
        self._system = system
        manifest = model.bundle.manifest
        self._shape = manifest.latent_shape
        self._decoder = manifest.decoder.name
        self._encoder = manifest.encoder.name if manifest.encoder else ""
        _, height, width = self._shape
        alone = self._engine.device == "cpu" and height * width >= _FILLS_A_CPU
        self._batch = RunningBatch(self._engine, manifest.step, 1 if alone else None)

    def start(self, image: ImageJob) -> Sample:
        """Lets a picture join: encodes the conditions of its next placement and draws the first latent."""
        job, of_pass = image.job, image.next_pass
        arguments = (image.prepared, of_pass.sampling, of_pass.schedule, job.watch)
        OWNER.set(job.owner)
        if image.drawn:
            conditions = self._system.conditions(*arguments)
        else:
            # the first object meets the same scene in all pictures
            conditions = job.first_conditions or self._system.conditions(*arguments)
            # after the last picture has started they belong to the samples: job and pictures hold each
            # other, and what they hold stays on the device until Python looks for cycles
            job.first_conditions = None if image is job.images[-1] else conditions
        generator = image.new_generator()
        if job.initial_noise is not None:
            noise = job.initial_noise[image.index]
        else:
            noise = generator.standard_normal(self._shape, dtype=np.float32)
        latent = of_pass.first_latent(noise, self._clean_latent(image))
        row = LatentRow(self._engine.to_device(latent[None]), 0, 1)
        sample = Sample(conditions, of_pass.schedule, of_pass.sampling, row, generator)
        self.running[sample] = image
        return sample

    def _clean_latent(self, image: ImageJob) -> NDArray[np.float32] | None:
        """Returns the latent that the next pass starts from, (C, h, w); None for noise alone."""
        start = image.prepared.start
        if start is None:
            return None
        with image.job.watch.measure("condition"):
            latent = self._engine.run(self._encoder, {"picture": start[None]})["latent"]
            clean: NDArray[np.float32] = self._engine.to_host(latent)[0]
        return clean

    def steps_alike(self) -> int:
        """Returns how many steps `step` can take at once; one if the pictures are at different ones."""
        self._batch.samples = list(self.running)
        return self._batch.steps_alike()

    def step(self, steps: int = 1) -> list[Sample]:
        """Takes steps with all pictures; returns their samples. One that fails gets its `error`."""
        self._batch.samples = samples = list(self.running)
        self._batch.step(steps)
        return samples

    @property
    def samples_per_call(self) -> int | None:
        """Most samples in one call of the step graph; all if None."""
        return self._batch.samples_per_call

    @property
    def last_call(self) -> StepCall:
        """The call of the step graph that was made last."""
        return self._batch.last_call

    def finished(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Drawn]]:
        """Lets the engine decode the samples that are done. One that it refuses gets its `error`, and is not
        yielded."""
        done = [sample for sample in samples if sample.done and not sample.error]
        return self._decode([(sample, self._batch.latents([sample])) for sample in done])

    def previews(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Drawn]]:
        """Lets it decode what the samples that were asked for it look like so far; likewise."""
        asked = [(sample, sample.clean_latent) for sample in samples]
        latents = [(sample, latent[None]) for sample, latent in asked if latent is not None]
        for sample, _ in latents:
            sample.clean_latent = None
        return self._decode(latents)

    def _decode(
        self, latents: Sequence[tuple[Sample, DeviceTensor | NDArray[np.float32]]]
    ) -> Iterator[tuple[Sample, Drawn]]:
        for sample, latent in latents:
            watch = self.running[sample].job.watch
            try:
                with watch.measure("decode"):
                    image = self._engine.run(self._decoder, {"latent": latent}, ["image"])["image"]
            except Exception as error:
                sample.error = error
                continue
            yield sample, partial(self._fetch, image, watch)

    def _fetch(self, image: DeviceTensor, watch: Stopwatch) -> Picture:
        with watch.measure("decode"):
            picture: Picture = self._engine.to_host(image)[0]
        return picture

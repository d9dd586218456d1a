"""One request on its way: what happens to it on the CPU, before and after the networks.

A job makes one or more pictures. Each is a `Canvas` that starts as the scene and takes the placements one
after the other: prepare the hint, let the networks draw, paste what they drew. The `Compositor` does all of
that in one thread, the `Scheduler` in several and for many jobs at once; the pictures are the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.ddim import Schedule
from runtime.imaging.boxes import Box
from runtime.imaging.collage import MODES, Hint, Mode, Ratios, make_hint
from runtime.imaging.paste_back import paste_back, pasted_region
from runtime.imaging.reference import PreparedReference, prepare_reference
from runtime.request import ResolvedPlacement, Sampling
from runtime.sampling.running_batch import Conditions


@dataclass(frozen=True, eq=False)
class Composite:
    """One picture, and how it came about."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB, of the scene's size."""
    seed: int
    """Gives the same picture again, on the same machine and bundle."""
    regions: tuple[Box, ...]
    """Per placement: the only part of the scene that it may have changed."""
    seconds: dict[str, float]
    """Stage -> time spent, for all pictures of the call together."""


class Stopwatch:
    """Time per stage; stages of one job may be measured in several threads."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> time spent so far."""
        with self._lock:
            return dict(self._seconds)

    def add(self, stage: str, seconds: float) -> None:
        """Counts time that was measured elsewhere."""
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Counts the time that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)


@dataclass(frozen=True, eq=False)
class PreparedPlacement:
    """A placement without its full-size reference: a job that waits keeps no more than it needs."""

    reference: PreparedReference
    target: Box | NDArray[np.bool_]
    mode: Mode
    ratios: Ratios


def prepare_placement(placement: ResolvedPlacement) -> PreparedPlacement:
    """Makes the reference small."""
    reference = prepare_reference(placement.reference, placement.reference_mask, placement.ratios.reference)
    return PreparedPlacement(reference, placement.target, MODES[placement.mode], placement.ratios)


@dataclass(eq=False)
class Job:
    """A request whose pictures are decoded and whose parameters are checked."""

    scene: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    placements: list[PreparedPlacement]
    sampling: Sampling
    schedule: Schedule
    seeds: list[int]
    """One per picture."""
    resolution: int
    """Side of the pictures that the networks draw."""
    initial_noise: NDArray[np.float32] | None = None
    """(N, C, h, w) latents to start from, instead of those of the seeds."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    first_conditions: Conditions | None = None
    """What the first placement of all pictures shares; set when the first of them starts."""
    canvases: list[Canvas] = field(init=False)

    def __post_init__(self) -> None:
        self.canvases = [Canvas(self, index, seed, self.scene) for index, seed in enumerate(self.seeds)]
        self._first_hint = self._make_hint(self.scene, 0)

    def hint(self, canvas: Canvas) -> Hint:
        """The hint of a canvas's next placement; the first object meets the same scene in all pictures."""
        return self._make_hint(canvas.image, canvas.placed) if canvas.placed else self._first_hint

    @property
    def total_steps(self) -> int:
        """Denoising steps of all pictures and placements together."""
        return self.schedule.steps * len(self.placements) * len(self.canvases)

    @property
    def done(self) -> bool:
        """Whether all pictures are finished."""
        return all(canvas.done for canvas in self.canvases)

    def results(self) -> list[Composite]:
        """The finished pictures."""
        seconds = self.watch.seconds
        return [Composite(c.image, c.seed, tuple(c.regions), dict(seconds)) for c in self.canvases]

    def _make_hint(self, scene: NDArray[np.uint8], index: int) -> Hint:
        placement = self.placements[index]
        with self.watch.measure("prepare"):
            return make_hint(
                scene,
                placement.target,
                placement.reference,
                placement.ratios,
                placement.mode,
                self.resolution,
            )


@dataclass(eq=False)
class Canvas:
    """One picture of a job: the scene, with as many objects in it as are placed."""

    job: Job
    index: int
    """Which of the job's pictures this is."""
    seed: int
    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    regions: list[Box] = field(default_factory=list)
    """What the objects placed so far may have changed."""
    hint: Hint = field(init=False)
    """For the placement at hand; set by `prepare`."""
    generator: np.random.Generator = field(init=False)
    """The placement's own random numbers; set by `prepare`."""

    @property
    def placed(self) -> int:
        """Objects in it, and so the index of the next placement."""
        return len(self.regions)

    @property
    def done(self) -> bool:
        """Whether all objects are placed."""
        return self.placed == len(self.job.placements)

    @property
    def reference(self) -> PreparedReference:
        """The next object."""
        return self.job.placements[self.placed].reference

    def prepare(self) -> None:
        """Makes what the networks need for the next placement."""
        self.hint = self.job.hint(self)
        # Philox: any seed and placement give an independent stream, whoever shares the batch
        self.generator = np.random.Generator(
            np.random.Philox(key=np.array([self.seed, self.placed], np.uint64))
        )

    def draw_latent(self, shape: tuple[int, int, int]) -> NDArray[np.float32]:
        """(C, h, w) noise to start the placement from."""
        if self.job.initial_noise is not None:
            given: NDArray[np.float32] = self.job.initial_noise[self.index]
            return given
        noise: NDArray[np.float32] = self.generator.standard_normal(shape, dtype=np.float32)
        return noise

    def overlay(self) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
        """A function that puts what the networks drew, (R, R, 3) RGB, at its place in a copy of the image.

        It stays with the placement at hand when the canvas moves on to the next.
        """
        return partial(paste_back, scene=self.image, geometry=self.hint.geometry, mode=self._mode)

    def paste(self, picture: NDArray[np.uint8]) -> None:
        """Ends a placement: keeps what the networks drew, (R, R, 3) RGB."""
        with self.job.watch.measure("paste"):
            self.image = self.overlay()(picture)
        self.regions.append(pasted_region(self.hint.geometry, self._mode))

    @property
    def _mode(self) -> Mode:
        return self.job.placements[self.placed].mode

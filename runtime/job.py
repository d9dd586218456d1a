"""Prepares a request before the networks run, and finishes it afterwards, on the CPU.

A job makes one or more pictures. Each is an `ImageJob` that starts as the scene and takes the placements one
after the other: prepare, let the networks draw, paste what they drew. `Compositor.run` does all of that in
one thread, the server's batcher in several and for many jobs at once; both draw with `runtime.drawing`, and
the pictures are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.boxes import Box
from runtime.imaging.picture import Picture
from runtime.imaging.scene import ShareOf, with_own_pixels
from runtime.result import Composite, Stopwatch
from runtime.sampling.conditions import OWNER, Conditions
from runtime.sampling.passes import Pass
from runtime.systems.system import Prepared, System


@dataclass(eq=False)
class Job:
    """A request whose pictures are decoded and whose parameters are checked."""

    system: System
    scene: Picture
    """As it was given; what the networks see of it is where the pictures start."""
    passes: list[tuple[Prepared, Pass]]
    """What is drawn one after the other: the placements in the scene as it is given, each followed by its
    tiles."""
    seeds: list[int]
    """One per picture."""
    initial_noise: NDArray[np.float32] | None = None
    """(N, C, h, w) latents to start from, instead of those of the seeds."""
    owner: str = ""
    """Whose request it is; what is kept of it for later pictures serves others with this name alone."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    first_conditions: Conditions | None = None
    """What the first placement of all pictures shares, from the start of the first to that of the last."""
    images: list[ImageJob] = field(default_factory=list)
    """One per seed."""
    warnings: list[str] = field(default_factory=list)
    """Anything unexpected about how the pictures were read."""

    @property
    def placements(self) -> list[Prepared]:
        """In the scene as it is given."""
        tiles = {id(tile) for prepared, _ in self.passes for tile in prepared.tiles}
        return [prepared for prepared, _ in self.passes if id(prepared) not in tiles]

    @property
    def total_steps(self) -> int:
        """Sampling steps of all pictures and placements together."""
        return sum(each.schedule.steps for _, each in self.passes) * len(self.images)

    def results(self) -> list[Composite]:
        """Returns the finished pictures."""
        seconds = self.watch.seconds
        return [
            Composite(
                image=of.finished(),
                seed=of.seed,
                regions=of.regions,
                seconds=dict(seconds),
                metadata=self.scene.metadata,
                warnings=tuple(self.warnings),
            )
            for of in self.images
        ]


@dataclass(eq=False)
class ImageJob:
    """One picture of a job: the scene, with as many objects in it as are placed."""

    job: Job
    index: int
    """Index of the picture in the job."""
    seed: int
    image: NDArray[np.uint8]
    """(H, W, 3) in sRGB."""
    prepared: Prepared
    """The next placement, or tile of one."""
    drawn: int = 0
    """Passes that are done, and so the index of the next one."""
    pasted: list[tuple[Box, ShareOf | None]] = field(default_factory=list)
    """Of each object that is placed so far, `Prepared.region` and `Prepared.share_of`."""

    @property
    def done(self) -> bool:
        """Whether all objects are placed."""
        return self.drawn == len(self.job.passes)

    @property
    def is_refining(self) -> bool:
        """Whether the next placement is a tile of one that was drawn before."""
        return self.prepared.is_tile

    @property
    def next_pass(self) -> Pass:
        """How the next placement is sampled."""
        return self.job.passes[self.drawn][1]

    @property
    def regions(self) -> tuple[Box, ...]:
        """The regions that the objects placed so far may have changed."""
        return tuple(region for region, _ in self.pasted)

    def finished(self) -> NDArray[np.uint8]:
        """Returns the picture in the scene's own colours and with its transparency, (H, W, 3) or (H, W,
        4)."""
        return with_own_pixels(self.image, self.job.scene, self.pasted)

    def new_generator(self) -> np.random.Generator:
        """Returns the random numbers of the next placement."""
        # Philox: any seed and placement give an independent stream, whoever shares the batch
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, self.drawn], np.uint64)))

    def overlay(self) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
        """Returns a function that puts what the networks drew, (R, R, 3) RGB, at its place in a copy of the
        image.

        It stays with this placement when the image moves on to the next.
        """
        return partial(self.job.system.finish, scene=self.image, prepared=self.prepared)

    def paste(self, picture: NDArray[np.uint8]) -> None:
        """Ends a placement: keeps what the networks drew, (R, R, 3) RGB, and prepares the next placement."""
        job = self.job
        with job.watch.measure("paste"):
            self.image = job.system.finish(picture, self.image, self.prepared)
        if not self.is_refining:
            self.pasted.append((self.prepared.region, self.prepared.share_of))
        self.drawn += 1
        if not self.done:
            OWNER.set(job.owner)
            self.prepared = job.system.renew(job.passes[self.drawn][0], self.image, job.watch)

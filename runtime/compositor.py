"""The Compositor: a scene and placements go in, pictures come out."""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.bundle import Bundle
from engines.engine import Engine, open_engine
from engines.errors import BundleError
from engines.memory_plan import LARGEST_CACHE
from engines.options import EngineOptions
from runtime.diffusion.ddim import Schedule
from runtime.diffusion.samplers import SAMPLERS
from runtime.drawing import Drawing
from runtime.errors import InputError, in_field
from runtime.imaging.geometry import Ratios
from runtime.imaging.pictures import PictureLike, load_picture
from runtime.job import ImageJob, Job
from runtime.parameters import (
    PLACEMENT_PARAMETERS,
    SAMPLING_PARAMETERS,
    SamplingParameters,
    placement_parameters,
    sampling_parameters,
)
from runtime.request import Placement, Request, Sampling
from runtime.result import Composite, Stopwatch
from runtime.sampling.running_batch import guided_steps
from runtime.systems import open_system
from runtime.systems.system import Model
from runtime.validation import (
    LARGEST,
    MAX_SEED,
    Limits,
    check_initial_noise,
    check_placement_count,
    check_sampling,
    check_seeds,
)

StepCallback = Callable[[int, int], object]
"""Called after every step with the steps done and all steps, counted over all pictures and placements."""

_SHARE_OF_MEMORY = 8


class Compositor:
    """Composites objects into scenes with one bundle.

    compositor = Compositor.load("build/engines/anydoor")
    image = compositor.composite(scene, Placement(reference, box=(80, 60, 300, 260)), seed=7)
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        cache_bytes: int | None = None,
        control_window: int | None = None,
    ) -> None:
        """Wraps an opened bundle and an engine that runs it; `load` is the usual way.

        Args:
            bundle: says sizes and defaults, and holds the constants.
            engine: runs the graphs.
            cache_bytes: memory for what is kept for re-rolls; see `default_cache_bytes`.
            control_window: sampling steps that a window graph computes in one call. If None, as many as the
                bundle's batch on a card, where they cost less together, and one on a CPU, where more cost
                memory and gain nothing.

        Raises:
            InputError: `control_window` is not in 1..max_batch.
            BundleError: this version cannot use the bundle.
        """
        manifest = bundle.manifest
        if control_window is None:
            control_window = 1 if engine.device == "cpu" else manifest.max_batch
        if not 1 <= control_window <= manifest.max_batch:
            raise InputError(
                f"control_window must be from 1 to {manifest.max_batch}, the bundle's max_batch, "
                f"not {control_window}"
            )
        unknown = sorted(manifest.defaults.keys() - {*SAMPLING_PARAMETERS, *PLACEMENT_PARAMETERS})
        if unknown:
            raise BundleError(
                f"the bundle at '{bundle.path}' has a default for '{unknown[0]}', which is no parameter"
            )
        constants = bundle.constants()
        self.bundle = bundle
        self.engine = engine
        self.model = Model(bundle, engine, constants, _cache_bytes(engine, cache_bytes), control_window)
        self.system = open_system(manifest.system, self.model)
        self.defaults: Mapping[str, Any] = {**self.system.defaults, **manifest.defaults}
        """Parameter -> its value where neither the request nor its quality says one."""
        self._alphas_cumprod = constants["alphas_cumprod"]
        self._check_defaults()

    def _check_defaults(self) -> None:
        """Refuses a bundle whose defaults no request could be drawn with.

        Raises:
            BundleError: names the default.
        """
        try:
            check_sampling(sampling_parameters(Sampling(), self.defaults))
            ratios = {name: self.defaults.get(f"{name}_ratio") for name in ("reference", "box", "crop")}
            Ratios(**{name: ratio for name, ratio in ratios.items() if ratio is not None})
        except InputError as error:
            raise BundleError(f"the bundle at '{self.bundle.path}' has unusable defaults: {error}") from error

    @classmethod
    def load(
        cls,
        path: str | Path,
        options: EngineOptions = EngineOptions(),
        cache_bytes: int | None = None,
        control_window: int | None = None,
    ) -> Compositor:
        """Opens a bundle; each graph is loaded when it is first needed.

        Args:
            path: directory that `anydoor build` wrote.
            options: where and how the graphs run.
            cache_bytes: see `__init__`.
            control_window: see `__init__`.

        Raises:
            AnyDoorError: the bundle or its backend cannot be used, and why.
        """
        bundle = Bundle.open(path)
        return cls(bundle, open_engine(bundle, options), cache_bytes, control_window)

    def load_graphs(self) -> Iterator[str]:
        """Loads all graphs now, so that the first picture does not wait; yields each name when ready."""
        for graph in self.bundle.manifest.graphs:
            self.engine.load(graph)
            yield graph

    @overload
    def composite(
        self,
        scene: PictureLike,
        placements: Placement | Sequence[Placement],
        *,
        seed: int | None = ...,
        sampling: Sampling | None = ...,
        num_images: None = ...,
        initial_noise: NDArray[np.float32] | None = ...,
        on_step: StepCallback | None = ...,
    ) -> Image.Image: ...

    @overload
    def composite(
        self,
        scene: PictureLike,
        placements: Placement | Sequence[Placement],
        *,
        seed: int | None = ...,
        sampling: Sampling | None = ...,
        num_images: int,
        initial_noise: NDArray[np.float32] | None = ...,
        on_step: StepCallback | None = ...,
    ) -> list[Image.Image]: ...

    def composite(
        self,
        scene: PictureLike,
        placements: Placement | Sequence[Placement],
        *,
        seed: int | None = None,
        sampling: Sampling | None = None,
        num_images: int | None = None,
        initial_noise: NDArray[np.float32] | None = None,
        on_step: StepCallback | None = None,
    ) -> Image.Image | list[Image.Image]:
        """The scene with the object in it, or several such pictures.

        Args:
            scene: file, bytes, Pillow image or array.
            placements: the object and its place; several are placed one after the other.
            seed: the same seed gives the same picture bit for bit on one machine; random if None. Picture i
                of several has the seed `seed + i`.
            sampling: steps, guidance scale and the like.
            num_images: how many pictures to return as a list; None returns a single one.
            initial_noise: (N, C, h, w) standard normal latents to start from instead of those of the seeds.
            on_step: called with (steps done, steps in all).

        Raises:
            InputError: something about the request cannot be used, in one sentence.
        """
        request = Request.of(scene, placements, seed, sampling, num_images, initial_noise)
        images = [Image.fromarray(result.image) for result in self.run(request, on_step)]
        return images[0] if num_images is None else images

    def run(self, request: Request, on_step: StepCallback | None = None) -> list[Composite]:
        """All pictures of a request, with seeds, regions and times.

        Args:
            request: what to draw.
            on_step: called with (steps done, steps in all).

        Raises:
            InputError: something about the request cannot be used, in one sentence.
        """
        job = self.accept(request)
        drawing = self.new_drawing()
        waiting = deque(job.images)
        done = 0
        while waiting or drawing.running:
            while waiting and len(drawing.running) < self.max_batch:
                drawing.start(waiting.popleft())
            with job.watch.measure("sample"):
                # between steps that nobody watches, the engine need not come back
                samples = drawing.step(1 if on_step else drawing.steps_alike())
            done += len(samples)
            if on_step and not any(sample.error for sample in samples):
                on_step(done, job.total_steps)
            for sample, drawn in list(drawing.finished(samples)):
                image = drawing.running.pop(sample)
                image.paste(drawn())
                if not image.done:
                    waiting.append(image)
            for sample in samples:
                if sample.error:
                    raise sample.error
        return job.results()

    def accept(self, request: Request, limits: Limits = LARGEST, watch: Stopwatch | None = None) -> Job:
        """Decodes, checks and prepares a request. Uses no engine and may run in any thread.

        Args:
            request: what to draw.
            limits: what it may ask for.
            watch: counts its stages, where some of its time has been measured.

        Raises:
            InputError: something about the request cannot be used, in one sentence.
        """
        num_images, noise = request.num_images, request.initial_noise
        seed = secrets.randbelow(MAX_SEED >> 32) if request.seed is None else request.seed
        sampling = self._check_numbers(request, limits)
        if noise is not None:
            noise = check_initial_noise(noise, (num_images, *self.bundle.manifest.latent_shape))
        watch = watch or Stopwatch()
        with watch.measure("read"), in_field("scene"):
            scene = load_picture(request.scene, "the scene", limits.pixels).rgb
        prepared = []
        for index, placement in enumerate(request.placements):
            with in_field(f"placements[{index}]"):
                given = {name: getattr(placement, name) for name in PLACEMENT_PARAMETERS}
                parameters = placement_parameters(given, self.defaults)
                prepared.append(self.system.prepare(scene, placement, parameters, limits, watch))
        job = Job(
            system=self.system,
            scene=scene,
            placements=prepared,
            sampling=sampling,
            schedule=self._schedule(sampling),
            seeds=[seed + i for i in range(num_images)],
            initial_noise=noise,
            watch=watch,
        )
        job.images = [ImageJob(job, index, seed, scene, prepared[0]) for index, seed in enumerate(job.seeds)]
        return job

    def steps_of(self, request: Request, limits: Limits = LARGEST) -> tuple[int, int]:
        """Counts the steps of a request with guidance and those without, over all pictures and placements.

        Decodes nothing and uses no engine.

        Raises:
            InputError: a number cannot be used, in one sentence.
        """
        sampling = self._check_numbers(request, limits)
        guided = guided_steps(sampling, self._schedule(sampling))
        runs = request.num_images * len(request.placements)
        return runs * guided.count(True), runs * guided.count(False)

    def _check_numbers(self, request: Request, limits: Limits) -> SamplingParameters:
        """Refuses what can be refused before anything is decoded."""
        with in_field("sampling"):
            sampling = sampling_parameters(request.sampling, self.defaults)
            check_sampling(sampling, limits)
        check_seeds(0 if request.seed is None else request.seed, request.num_images, limits)
        check_placement_count(len(request.placements), limits)
        return sampling

    def _schedule(self, sampling: SamplingParameters) -> Schedule:
        make = SAMPLERS[sampling.sampler]
        return make(self._alphas_cumprod, sampling.steps, sampling.eta, sampling.timesteps)

    def new_drawing(self) -> Drawing:
        """What draws the pictures of jobs; the engine serves one at a time."""
        return Drawing(self.model, self.system)

    def clear(self) -> None:
        """Drops what is kept for later pictures, like detail maps and ID tokens."""
        self.system.clear()

    @property
    def max_batch(self) -> int:
        """Most samples in one call."""
        return self.bundle.manifest.max_batch


def default_cache_bytes() -> int:
    """An eighth of the machine's memory, at most 4 GiB.

    The detail maps of AnyDoor at full size, 512 px, 50 steps with guidance take 2.7 GB in fp32 and 1.3 GB in
    fp16.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return LARGEST_CACHE // 4
    return min(memory // _SHARE_OF_MEMORY, LARGEST_CACHE)


def _cache_bytes(engine: Engine, wanted: int | None) -> int:
    """Bytes to keep: as many as wanted, never more than the engine's device has room for."""
    room = engine.cache_bytes
    if wanted is None:
        # on a card, what there is room for is already no more than is worth keeping
        wanted = room if engine.device != "cpu" and room is not None else default_cache_bytes()
    return wanted if room is None else min(wanted, room)

"""Defines the Compositor, which draws the pictures of a request."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.bundle import Bundle
from engines.engine import Engine, open_engine
from engines.errors import BundleError
from engines.options import EngineOptions
from runtime.cache_size import usable_cache_bytes
from runtime.drawing import Drawing
from runtime.errors import InputError, collecting_warnings, in_field, warn
from runtime.imaging.picture import Picture
from runtime.imaging.scene import load_scene, upright_mask
from runtime.imaging.sources import PictureLike
from runtime.imaging.target import is_integer
from runtime.job import ImageJob, Job
from runtime.parameters import (
    PLACEMENT_PARAMETERS,
    SamplingParameters,
    placement_parameters,
    sampling_parameters,
)
from runtime.request import Blank, Placement, Request, Sampling
from runtime.result import Composite, Stopwatch
from runtime.sampling.passes import Pass, first_pass, partial_pass, second_pass
from runtime.sampling.running_batch import guided_steps
from runtime.segmentation import Segmenter, check_segmenter, cut_out
from runtime.systems import open_system
from runtime.systems.system import Model, Prepared
from runtime.validation import (
    LARGEST,
    MAX_SEED,
    Limits,
    check_blank,
    check_defaults,
    check_initial_noise,
    check_placement_count,
    check_sampling,
    check_seeds,
    check_usable,
    in_placement,
)

StepCallback = Callable[[int, int], object]
"""Called after every step with the steps done and the total, counted over all pictures and placements."""


class Compositor:
    """Composites objects into scenes, or draws pictures from prompts, with one bundle.

    compositor = Compositor.load("build/engines/anydoor")
    image = compositor.composite(scene, Placement(reference, box=(80, 60, 300, 260)), seed=7)
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        cache_bytes: int | None = None,
        control_window: int | None = None,
        segmenter: Segmenter | None = None,
    ) -> None:
        """Wraps an opened bundle and an engine that runs it; `load` is the usual way.

        Args:
            bundle: has sizes, defaults and constants.
            engine: runs the graphs.
            cache_bytes: most memory to keep for re-rolls; see `runtime.cache_size`.
            control_window: sampling steps that a window graph computes in one call. If None, the bundle's
                batch on a card, where that is faster, and 1 on a CPU, where more only cost memory.
            segmenter: finds the objects of references without masks; if None, on plain backgrounds only.

        Raises:
            InputError: `control_window` is not in 1..max_batch.
            BundleError: this version cannot use the bundle.
        """
        manifest = bundle.manifest
        if manifest.is_segmenter:
            raise BundleError(f"the bundle at '{bundle.path}' is a segmenter: give it with --segmenter")
        if control_window is None:
            control_window = 1 if engine.device == "cpu" else manifest.max_batch
        if not is_integer(control_window) or not 1 <= control_window <= manifest.max_batch:
            most = f"{manifest.max_batch}, the bundle's max_batch"
            raise InputError(f"control_window must be from 1 to {most}, not {control_window}")
        constants = bundle.constants()
        self.bundle = bundle
        self.engine = engine
        self.segmenter = segmenter or Segmenter()
        self.model = Model(bundle, engine, constants, usable_cache_bytes(engine, cache_bytes), control_window)
        self.system = open_system(manifest.system, self.model)
        self.defaults: Mapping[str, Any] = {**self.system.defaults, **manifest.defaults}
        """Maps parameters to their values where neither the request nor its quality sets one."""
        self._alphas_cumprod = constants["alphas_cumprod"]
        try:
            check_defaults(self.defaults)
        except InputError as error:
            raise BundleError(f"the bundle at '{bundle.path}' has unusable defaults: {error}") from error

    @classmethod
    def load(
        cls,
        path: str | Path,
        options: EngineOptions = EngineOptions(),
        cache_bytes: int | None = None,
        control_window: int | None = None,
        trusted_key: str | Path | None = None,
        segmenter: Segmenter | None = None,
    ) -> Compositor:
        """Opens a bundle; each graph is loaded when it is first needed.

        Args:
            path: directory that `anydoor build` wrote.
            options: where and how the graphs run.
            cache_bytes, control_window, segmenter: see `__init__`.
            trusted_key: PEM file with an Ed25519 public key; the bundle must be signed with its private key
                (`anydoor sign`). If None, no signature is needed.

        Raises:
            AnyDoorError: the bundle or its backend cannot be used; the message says why.
        """
        bundle = Bundle.open(path, None if trusted_key is None else Path(trusted_key))
        engine = open_engine(bundle, options, cache_bytes)
        try:
            return cls(bundle, engine, cache_bytes, control_window, segmenter)
        except BaseException:
            engine.close()
            raise

    def load_graphs(self) -> Iterator[str]:
        """Loads all graphs ahead of the first picture; yields the name of each when it is ready."""
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
        """Draws the object into the scene; returns the picture, or several.

        Args:
            scene: file, bytes, open file, Pillow image, array or tensor.
            placements: the object and its place; several are drawn one after the other.
            seed: the same seed gives the same picture bit for bit on one machine; random if None. Picture i
                of several has the seed `seed + i`.
            sampling: steps, guidance scale and other parameters.
            num_images: number of pictures to return as a list; None returns a single picture.
            initial_noise: (N, C, h, w) standard normal latents to start from instead of those of the seeds.
            on_step: called with (steps done, total steps).

        Returns:
            Pictures with the scene's transparency and colour profile; their `info` has the profile, EXIF and
            resolution. Anything unexpected about pictures and masks is issued as an `InputWarning`.

        Raises:
            InputError: the request is invalid; the message says what to change.
        """
        request = Request.of(scene, placements, seed, sampling, num_images, initial_noise)
        images = self._images(request, on_step)
        return images[0] if num_images is None else images

    @overload
    def draw(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = ...,
        size: tuple[int, int] | None = ...,
        seed: int | None = ...,
        sampling: Sampling | None = ...,
        num_images: None = ...,
        initial_noise: NDArray[np.float32] | None = ...,
        on_step: StepCallback | None = ...,
    ) -> Image.Image: ...

    @overload
    def draw(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = ...,
        size: tuple[int, int] | None = ...,
        seed: int | None = ...,
        sampling: Sampling | None = ...,
        num_images: int,
        initial_noise: NDArray[np.float32] | None = ...,
        on_step: StepCallback | None = ...,
    ) -> list[Image.Image]: ...

    def draw(
        self,
        prompt: str,
        *,
        num_images: int | None = None,
        on_step: StepCallback | None = None,
        **others: Any,
    ) -> Image.Image | list[Image.Image]:
        """Draws a picture from a prompt, or several; the bundle's model must take prompts.

        Args:
            prompt: what to draw.
            num_images, on_step: see `composite`.
            others: `negative_prompt` is what not to draw; `size` is (width, height), which must be the
                bundle's; all others are arguments of `composite`.

        Raises:
            InputError: the request is invalid; the message says what to change.
        """
        request = Request.drawing(prompt, num_images=num_images, **others)
        images = self._images(request, on_step)
        return images[0] if num_images is None else images

    def _images(self, request: Request, on_step: StepCallback | None) -> list[Image.Image]:
        results = self.run(request, on_step)
        for text in results[0].warnings:
            warn(text)
        return [result.to_pillow() for result in results]

    def run(self, request: Request, on_step: StepCallback | None = None) -> list[Composite]:
        """Draws all pictures of a request; returns them with seeds, regions and times.

        Args:
            request: what to draw.
            on_step: called with (steps done, total steps).

        Raises:
            InputError: the request is invalid; the message says what to change.
        """
        job = self.accept(request)
        drawing = self.new_drawing()
        waiting, done = deque(job.images), 0
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
            limits: the largest values that are allowed.
            watch: records the time of its stages.

        Raises:
            InputError: the request is invalid; the message says what to change.
        """
        num_images, noise = request.num_images, request.initial_noise
        seed = secrets.randbelow(MAX_SEED >> 32) if request.seed is None else request.seed
        sampling = self._check_numbers(request, limits)
        if noise is not None:
            noise = check_initial_noise(noise, (num_images, *self.bundle.manifest.latent_shape))
        watch = watch or Stopwatch()
        with collecting_warnings() as warnings:
            with watch.measure("read"), in_field("scene"):
                seen, scene = self._load_scene(request, limits)
            first, passes = first_pass(self._alphas_cumprod, sampling), list[tuple[Prepared, Pass]]()
            for index, placement in enumerate(request.placements):
                with in_placement(request, index):
                    mask = placement.mask
                    mask = None if mask is None else upright_mask(mask, scene, limits.pixels)
                    turned = cut_out(replace(placement, mask=mask), self.segmenter, limits.pixels, watch)
                    passes += self._prepare(request, turned, seen, limits, watch, first)
        job = Job(
            system=self.system,
            scene=scene,
            passes=passes,
            seeds=[seed + i for i in range(num_images)],
            initial_noise=noise,
            watch=watch,
            warnings=warnings,
        )
        job.images = [ImageJob(job, index, seed, seen, passes[0][0]) for index, seed in enumerate(job.seeds)]
        return job

    def _prepare(
        self,
        request: Request,
        placement: Placement,
        scene: NDArray[np.uint8],
        limits: Limits,
        watch: Stopwatch,
        first: Pass,
    ) -> list[tuple[Prepared, Pass]]:
        if isinstance(request.scene, Blank) and placement.box is None and placement.mask is None:
            placement = replace(placement, box=(0, 0, scene.shape[1], scene.shape[0]))
        given = {name: getattr(placement, name) for name in PLACEMENT_PARAMETERS}
        parameters = placement_parameters(given, self.defaults)
        prepared = self.system.prepare(scene, placement, parameters, limits, watch)
        of_place = partial_pass(self._alphas_cumprod, first, parameters.strength)
        if not prepared.tiles:
            return [(prepared, of_place)]
        second = second_pass(self._alphas_cumprod, first, parameters.refine or 0)
        return [(prepared, of_place), *((tile, second) for tile in prepared.tiles)]

    def steps_of(self, request: Request, limits: Limits = LARGEST) -> tuple[int, int]:
        """Counts a request's steps with guidance and those without; of refined places without their tiles.

        Decodes nothing and uses no engine.

        Raises:
            InputError: a number is out of range.
        """
        sampling = self._check_numbers(request, limits)
        full, guided = first_pass(self._alphas_cumprod, sampling), []
        for index, each in enumerate(request.placements):
            with in_placement(request, index):
                strength = self.defaults.get("strength") if each.strength is None else each.strength
                guided += guided_steps(sampling, partial_pass(self._alphas_cumprod, full, strength).schedule)
        return request.num_images * guided.count(True), request.num_images * guided.count(False)

    def _check_numbers(self, request: Request, limits: Limits) -> SamplingParameters:
        """Checks what can be checked before anything is decoded."""
        with in_field("sampling"):
            sampling = sampling_parameters(request.sampling, self.defaults)
            check_sampling(sampling, limits)
        check_seeds(0 if request.seed is None else request.seed, request.num_images, limits)
        check_placement_count(len(request.placements), limits)
        check_usable(request, self.system.abilities)
        check_segmenter(request, self.segmenter)
        if isinstance(request.scene, Blank):
            check_blank(request.scene, self.bundle.manifest.picture_size)
        return sampling

    def _load_scene(self, request: Request, limits: Limits) -> tuple[NDArray[np.uint8], Picture]:
        """Returns the scene as the networks see it, (H, W, 3) RGB, and the scene; grey if there is none."""
        if isinstance(request.scene, Blank):
            return load_scene(np.full((*self.bundle.manifest.picture_size, 3), 128, np.uint8))
        return load_scene(request.scene, limits.pixels, request.scene_size)

    def new_drawing(self) -> Drawing:
        """Returns an object that draws the pictures of jobs; the engine serves one at a time."""
        return Drawing(self.model, self.system)

    def clear(self) -> None:
        """Drops what is cached for later pictures, like detail maps and ID tokens."""
        self.system.clear()

    @property
    def max_batch(self) -> int:
        """Returns the largest number of samples in one call."""
        return self.bundle.manifest.max_batch

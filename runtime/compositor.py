"""The Compositor: a scene and placements go in, pictures come out."""

from __future__ import annotations

import itertools
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.bundle import Bundle
from engines.engine import Engine, open_engine
from engines.graphs import DECODE, GRAPHS, ID_ENCODER
from runtime.boxes import Box
from runtime.collage import MODES, Hint, make_hint
from runtime.ddim import ddim_schedule
from runtime.detail_maps import DetailMapCache, DetailMaps, default_cache_budget
from runtime.errors import InputError
from runtime.paste_back import paste_back, pasted_region
from runtime.pictures import PictureLike, load_picture
from runtime.reference import PreparedReference, prepare_reference
from runtime.request import Placement, ResolvedPlacement, Sampling
from runtime.sampling import has_guidance, sample
from runtime.validation import MAX_SEED, check_initial_noise, check_sampling, check_seeds, resolve_placement

StepCallback = Callable[[int, int], object]
"""Called after every step with the number of steps done and the number of all steps."""

_KEPT_TOKENS = 32
"""References whose ID tokens are remembered; 1 MB each at full size."""


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


@dataclass
class _Stopwatch:
    """Time per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


class Compositor:
    """Composites objects into scenes with one bundle.

    compositor = Compositor.load("build/engines/anydoor")
    image = compositor.composite(scene, Placement(reference, box=(80, 60, 300, 260)), seed=7)
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, cache_bytes: int | None = None, control_window: int = 1
    ) -> None:
        """Wraps an opened bundle and an engine that runs it; `load` is the usual way.

        Args:
            bundle: tells sizes and holds the constants.
            engine: runs the graphs.
            cache_bytes: memory for detail maps that are kept for re-rolls; see `default_cache_budget`.
            control_window: sampling steps whose detail maps are computed in one call. More than 1 pays on a
                GPU; on a CPU it costs memory and gains nothing.
        """
        if not 1 <= control_window <= bundle.manifest.max_batch:
            raise InputError(
                f"control_window must be from 1 to {bundle.manifest.max_batch}, the bundle's max_batch, "
                f"not {control_window}"
            )
        self.bundle = bundle
        self.engine = engine
        self.cache = DetailMapCache(default_cache_budget() if cache_bytes is None else cache_bytes)
        self.control_window = control_window
        self._model = bundle.manifest.model
        constants = bundle.constants()
        self._alphas_cumprod = constants["alphas_cumprod"]
        self._unconditional_tokens = constants["unconditional_tokens"]
        self._tokens: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        threads: int | None = None,
        cache_bytes: int | None = None,
        control_window: int = 1,
    ) -> Compositor:
        """Opens a bundle; each graph is loaded when it is first needed.

        Args:
            path: directory that `build_engines.py` wrote.
            device: cpu, cuda, or auto for the best this machine has.
            threads: CPU threads; all cores if None.
            cache_bytes: see `__init__`.
            control_window: see `__init__`.

        Raises:
            AnyDoorError: the bundle or its backend cannot be used, and why.
        """
        bundle = Bundle.open(path)
        return cls(bundle, open_engine(bundle, device, threads), cache_bytes, control_window)

    def load_graphs(self) -> Iterator[str]:
        """Loads all graphs now, so that the first picture does not wait; yields each name when ready."""
        for graph in GRAPHS:
            self.engine.load(graph)
            yield graph

    @overload
    def composite(
        self,
        scene: PictureLike,
        placements: Placement | Sequence[Placement],
        *,
        seed: int | None = ...,
        sampling: Sampling = ...,
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
        sampling: Sampling = ...,
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
        sampling: Sampling = Sampling(),
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
            sampling: steps, guidance and the like.
            num_images: how many pictures to return as a list; None returns a single one.
            initial_noise: (N, C, h, w) standard normal latents to start from instead of those of the seeds.
            on_step: called with (steps done, steps in all).

        Raises:
            InputError: something about the request cannot be used, in one sentence.
        """
        results = self.run(scene, placements, seed, sampling, num_images or 1, initial_noise, on_step)
        images = [Image.fromarray(result.image) for result in results]
        return images[0] if num_images is None else images

    def run(
        self,
        scene: PictureLike,
        placements: Placement | Sequence[Placement],
        seed: int | None = None,
        sampling: Sampling = Sampling(),
        num_images: int = 1,
        initial_noise: NDArray[np.float32] | None = None,
        on_step: StepCallback | None = None,
    ) -> list[Composite]:
        """Like `composite`, and returns seeds, regions and times with the pictures."""
        seed = secrets.randbelow(MAX_SEED >> 32) if seed is None else seed
        check_sampling(sampling)
        check_seeds(seed, num_images)
        placements = [placements] if isinstance(placements, Placement) else list(placements)
        if not placements:
            raise InputError("there is nothing to place: give at least one placement")
        seeds = [seed + i for i in range(num_images)]
        if initial_noise is not None:
            initial_noise = check_initial_noise(initial_noise, (num_images, *self._latent_shape))
        watch = _Stopwatch()
        with watch.measure("read"):
            picture = load_picture(scene, "the scene").rgb
            resolved = [resolve_placement(placement, picture) for placement in placements]
        count = _count_steps(on_step, sampling, len(resolved), num_images, self.bundle.manifest.max_batch)
        images: list[NDArray[np.uint8]] = [picture] * num_images
        regions: list[Box] = []
        for index, placement in enumerate(resolved):
            generators = [_generator(s, index) for s in seeds]
            latents = initial_noise if initial_noise is not None else self._draw(generators)
            images, region = self._place(
                images, placement, index, sampling, latents, generators, count, watch
            )
            regions.append(region)
        return [Composite(i, s, tuple(regions), dict(watch.seconds)) for i, s in zip(images, seeds)]

    def _place(
        self,
        scenes: list[NDArray[np.uint8]],
        placement: ResolvedPlacement,
        index: int,
        sampling: Sampling,
        latents: NDArray[np.float32],
        generators: list[np.random.Generator],
        on_step: Callable[[], None],
        watch: _Stopwatch,
    ) -> tuple[list[NDArray[np.uint8]], Box]:
        """Puts one object into all pictures."""
        with watch.measure("prepare"):
            reference = prepare_reference(
                placement.reference, placement.reference_mask, placement.ratios.reference
            )
        tokens = self.encode_reference(reference, watch)
        # the first object meets the same scene in every picture; the next ones meet different pictures
        batch = self.bundle.manifest.max_batch if index == 0 else 1
        mode = MODES[placement.mode]
        composites: list[NDArray[np.uint8]] = []
        hint: Hint | None = None
        for start in range(0, len(scenes), batch):
            chosen = slice(start, start + batch)
            if hint is None or index > 0:
                with watch.measure("prepare"):
                    hint = make_hint(
                        scenes[start],
                        placement.target,
                        reference,
                        placement.ratios,
                        mode,
                        self._model.resolution,
                    )
            pictures = self.generate(
                hint.hint, tokens, sampling, latents[chosen], generators[chosen], on_step, watch
            )
            with watch.measure("paste"):
                composites += [
                    paste_back(picture, scene, hint.geometry, mode)
                    for picture, scene in zip(pictures, scenes[chosen])
                ]
        assert hint is not None
        return composites, pasted_region(hint.geometry, mode)

    def encode_reference(
        self, reference: PreparedReference, watch: _Stopwatch | None = None
    ) -> NDArray[np.float32]:
        """ID tokens (1, T, D) of a prepared reference; remembered for the next call."""
        key = reference.image.tobytes()
        if key in self._tokens:
            self._tokens.move_to_end(key)
            return self._tokens[key]
        with (watch or _Stopwatch()).measure(ID_ENCODER):
            network_input = (reference.image.astype(np.float32) / 255).transpose(2, 0, 1)[None]
            outputs = self.engine.run(ID_ENCODER, {"reference": network_input})
            tokens: NDArray[np.float32] = self.engine.to_host(outputs["tokens"])
        self._tokens[key] = tokens
        if len(self._tokens) > _KEPT_TOKENS:
            self._tokens.popitem(last=False)
        return tokens

    def generate(
        self,
        hint: NDArray[np.float32],
        tokens: NDArray[np.float32],
        sampling: Sampling,
        latents: NDArray[np.float32],
        generators: Sequence[np.random.Generator] = (),
        on_step: Callable[[], None] | None = None,
        watch: _Stopwatch | None = None,
    ) -> NDArray[np.uint8]:
        """The networks alone: from hint and ID tokens to pictures.

        Args:
            hint: (4, R, R).
            tokens: (1, T, D) ID tokens of the reference.
            sampling: steps, guidance and the like.
            latents: (N, C, h, w) noise to start from; N at most the bundle's max_batch.
            generators: one per sample, for eta > 0.
            on_step: called after every step.
            watch: keeps the times.

        Returns:
            (N, R, R, 3) uint8 RGB.
        """
        watch = watch or _Stopwatch()
        if has_guidance(sampling):
            tokens = np.concatenate([tokens, self._unconditional_tokens])
        schedule = ddim_schedule(self._alphas_cumprod, sampling.steps, sampling.eta, sampling.timesteps)
        maps = DetailMaps(
            self.engine, self.cache, hint, tokens, schedule.timesteps.tolist(), self.control_window
        )
        latent = None
        with watch.measure("sample"):
            for latent in sample(  # noqa: B007
                self.engine, maps, tokens, schedule, sampling, latents, generators
            ):
                if on_step:
                    on_step()
        with watch.measure(DECODE):
            image = self.engine.run(DECODE, {"latent": latent}, ["image"])["image"]
            pictures: NDArray[np.uint8] = self.engine.to_host(image)
        return pictures

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        return (self._model.latent_channels, self._model.latent_size, self._model.latent_size)

    def _draw(self, generators: list[np.random.Generator]) -> NDArray[np.float32]:
        return np.stack([g.standard_normal(self._latent_shape, dtype=np.float32) for g in generators])


def _generator(seed: int, placement: int) -> np.random.Generator:
    """The random numbers of one sample: its own, whoever shares its batch."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, placement], np.uint64)))


def _count_steps(
    on_step: StepCallback | None, sampling: Sampling, placements: int, images: int, batch: int
) -> Callable[[], None]:
    """Adds the steps of all batches and placements up for one progress callback."""
    steps = len(sampling.timesteps) if sampling.timesteps is not None else sampling.steps
    total = steps * (-(-images // batch) + (placements - 1) * images)
    done = itertools.count(1)

    def count() -> None:
        if on_step:
            on_step(next(done), total)

    return count

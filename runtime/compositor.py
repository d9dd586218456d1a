"""The Compositor: a scene and placements go in, pictures come out."""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.bundle import Bundle
from engines.engine import DeviceTensor, Engine, open_engine
from engines.spec import DECODE, GRAPHS, ID_ENCODER
from runtime.diffusion.samplers import sampler_schedule
from runtime.errors import InputError, in_field
from runtime.imaging.pictures import PictureLike, load_picture
from runtime.imaging.reference import PreparedReference
from runtime.job import Canvas, Composite, Job, Stopwatch, prepare_placement
from runtime.request import Placement, Request, Sampling
from runtime.sampling.detail_maps import DetailMapCache, DetailMaps, default_cache_budget, shared_timesteps
from runtime.sampling.running_batch import Conditions, LatentRow, RunningBatch, Sample, guided_steps
from runtime.validation import (
    LARGEST,
    MAX_SEED,
    Limits,
    check_initial_noise,
    check_placements,
    check_sampling,
    check_seeds,
    resolve_placement,
)

StepCallback = Callable[[int, int], object]
"""Called after every step with the steps done and all steps, counted over all pictures and placements."""

_KEPT_TOKENS = 32
"""References whose ID tokens are remembered; 1 MB each at full size."""


_FILLS_A_CPU = 32 * 32
"""Cells of a latent from which on one sample keeps a CPU busy: more in a call cost more than they share, in
time and in memory (docs/performance.md, samples in a call)."""


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
        self.cache = DetailMapCache(_cache_budget(engine, cache_bytes))
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
        memory_budget: int | None = None,
        backend: str = "auto",
        inference_precision: str = "fp32",
        cuda_graphs: bool = False,
    ) -> Compositor:
        """Opens a bundle; each graph is loaded when it is first needed.

        Args:
            path: directory that `build_engines.py` wrote.
            device: cpu, cuda, or auto for the best this machine has.
            threads: CPU threads; all cores if None.
            cache_bytes: see `__init__`.
            control_window: see `__init__`.
            memory_budget: bytes of the device's memory to use at the most; nearly all that is free if None.
            backend: what executes the graphs; see `engines.engine.open_engine`, as for the next two.
            inference_precision: of graphs that are in float32, fp32 or bf16.
            cuda_graphs: whether ONNX Runtime captures the denoise graph on a card.

        Raises:
            AnyDoorError: the bundle or its backend cannot be used, and why.
        """
        bundle = Bundle.open(path)
        engine = open_engine(
            bundle, device, threads, memory_budget, backend, inference_precision, cuda_graphs
        )
        return cls(bundle, engine, cache_bytes, control_window)

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
        placements = [placements] if isinstance(placements, Placement) else list(placements)
        job = self.accept(Request(scene, placements, seed, sampling, num_images, initial_noise))
        batch = self.new_batch()
        waiting = deque(job.canvases)
        running: dict[Sample, Canvas] = {}
        done = 0
        while waiting or running:
            while waiting and len(running) < self.max_batch:
                canvas = waiting.popleft()
                canvas.prepare()
                running[self.start(canvas)] = canvas
            batch.samples = list(running)
            with job.watch.measure("sample"):
                # between steps that nobody watches, the engine need not come back
                batch.step(1 if on_step else batch.steps_alike())
            for sample in batch.samples:
                if sample.error:
                    raise sample.error
            done += len(batch.samples)
            if on_step:
                on_step(done, job.total_steps)
            finished = [sample for sample in batch.samples if sample.done]
            if not finished:
                continue
            with job.watch.measure(DECODE):
                pictures = [self.decode(batch.latents([sample])) for sample in finished]
            for sample, picture in zip(finished, pictures):
                canvas = running.pop(sample)
                canvas.paste(picture)
                if not canvas.done:
                    waiting.append(canvas)
        return job.results()

    # The stages that `run` and the `Scheduler` share. `accept` uses no engine and may run in any thread.

    def accept(self, request: Request, limits: Limits = LARGEST) -> Job:
        """Decodes and checks a request.

        Raises:
            InputError: something about the request cannot be used, in one sentence.
        """
        sampling, num_images, noise = request.sampling, request.num_images, request.initial_noise
        seed = secrets.randbelow(MAX_SEED >> 32) if request.seed is None else request.seed
        with in_field("sampling"):
            check_sampling(sampling, limits)
        check_seeds(seed, num_images, limits)
        check_placements(request.placements, limits)
        if noise is not None:
            noise = check_initial_noise(noise, (num_images, *self.latent_shape))
        watch = Stopwatch()
        with watch.measure("read"), in_field("scene"):
            picture = load_picture(request.scene, "the scene", limits.pixels).rgb
        prepared = []
        for index, placement in enumerate(request.placements):
            with watch.measure("read"), in_field(f"placements[{index}]"):
                resolved = resolve_placement(placement, picture, limits.pixels)
            with watch.measure("prepare"):
                prepared.append(prepare_placement(resolved))
        return Job(
            scene=picture,
            placements=prepared,
            sampling=sampling,
            schedule=sampler_schedule(
                self._alphas_cumprod, sampling.sampler, sampling.steps, sampling.eta, sampling.timesteps
            ),
            seeds=[seed + i for i in range(num_images)],
            resolution=self._model.resolution,
            initial_noise=noise,
            watch=watch,
        )

    def new_batch(self) -> RunningBatch:
        """An empty batch for this bundle."""
        _, height, width = self.latent_shape
        alone = self.engine.device == "cpu" and height * width >= _FILLS_A_CPU
        return RunningBatch(self.engine, self.latent_shape, 1 if alone else None)

    def start(self, canvas: Canvas) -> Sample:
        """A sample for a canvas that is prepared."""
        job = canvas.job
        if canvas.placed > 0:
            conditions = self._conditions(canvas)
        else:
            # the first object meets the same scene in all pictures
            conditions = job.first_conditions = job.first_conditions or self._conditions(canvas)
        latent = self.engine.to_device(canvas.draw_latent(self.latent_shape)[None])
        return Sample(conditions, job.schedule, job.sampling, LatentRow(latent, 0, 1), canvas.generator)

    def _conditions(self, canvas: Canvas) -> Conditions:
        job = canvas.job
        tokens = self.encode_reference(canvas.reference, job.watch)
        guided = guided_steps(job.sampling, job.schedule)
        if any(guided):
            tokens = np.concatenate([tokens, self._unconditional_tokens])
        timesteps = shared_timesteps(job.schedule.timesteps.tolist(), job.sampling.map_steps)
        maps = DetailMaps(
            self.engine, self.cache, canvas.hint.hint, tokens, timesteps, self.control_window, guided
        )
        return Conditions(maps, tokens)

    def decode(self, latent: DeviceTensor | NDArray[np.float32]) -> NDArray[np.uint8]:
        """(R, R, 3) RGB picture of a latent (1, C, h, w)."""
        image = self.engine.run(DECODE, {"latent": latent}, ["image"])["image"]
        picture: NDArray[np.uint8] = self.engine.to_host(image)[0]
        return picture

    def encode_reference(
        self, reference: PreparedReference, watch: Stopwatch | None = None
    ) -> NDArray[np.float32]:
        """ID tokens (1, T, D) of a prepared reference; remembered for the next call."""
        key = reference.image.tobytes()
        if key in self._tokens:
            self._tokens.move_to_end(key)
            return self._tokens[key]
        with (watch or Stopwatch()).measure(ID_ENCODER):
            network_input = (reference.image.astype(np.float32) / 255).transpose(2, 0, 1)[None]
            outputs = self.engine.run(ID_ENCODER, {"reference": network_input})
            tokens: NDArray[np.float32] = self.engine.to_host(outputs["tokens"])
        self._tokens[key] = tokens
        if len(self._tokens) > _KEPT_TOKENS:
            self._tokens.popitem(last=False)
        return tokens

    def forget(self) -> None:
        """Drops what is kept for later pictures: detail maps and ID tokens."""
        self.cache.clear()
        self._tokens.clear()

    @property
    def max_batch(self) -> int:
        """Most samples in one call."""
        return self.bundle.manifest.max_batch

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return (self._model.latent_channels, self._model.latent_size, self._model.latent_size)


def _cache_budget(engine: Engine, wanted: int | None) -> int:
    """Bytes of detail maps to keep: as many as wanted, never more than the engine's device has room for."""
    room = engine.cache_bytes
    if wanted is None:
        # on a card, what there is room for is already no more than is worth keeping
        wanted = room if engine.device != "cpu" and room is not None else default_cache_budget()
    return wanted if room is None else min(wanted, room)

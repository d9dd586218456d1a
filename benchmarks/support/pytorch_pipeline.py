"""The baseline of latency.py: the same checkpoint as a plain PyTorch pipeline of diffusers modules.

As in diffusers' own ControlNet pipelines, the ControlNet runs at every step and for both halves of the
guidance, nothing is kept from one picture to the next, and the samples of a placement are a batch.
Pre-processing, schedule and pasting are the runtime's own functions, so that pictures can be compared: the
same noise gives the same picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.support.precisions import torch_dtype
from benchmarks.support.sampling_step import guided_step
from engines.spec import DECODE, ID_ENCODER
from runtime.diffusion.ddim import ddim_schedule
from runtime.diffusion.noise_schedule import alphas_cumprod
from runtime.imaging.pictures import PictureLike, load_picture
from runtime.job import Composite, Job, Stopwatch, prepare_placement
from runtime.request import Placement, Sampling
from runtime.validation import LARGEST, resolve_placement
from training.network.architecture import REFERENCE_SIZE
from training.network.checkpoint import read_checkpoint
from training.network.official_keys import PREFIXES


class PyTorchPipeline:
    """Composites with PyTorch."""

    def __init__(
        self,
        checkpoint: Path,
        resolution: int,
        device: str = "cpu",
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        """Load a checkpoint.

        Args:
            checkpoint: the file that the bundle was built from.
            resolution: side of the pictures that the networks draw.
            device: cpu or cuda.
            precision: of weights and activations: fp32, fp16 or bf16.
            compiled: run UNet, ControlNet and VAE through `torch.compile`; on a card with CUDA graphs.
        """
        opened = read_checkpoint(checkpoint)
        self.device = device
        self.synchronous = device == "cpu"
        """Whether to wait for every stage, to measure each; on a card calls return before they are done."""
        self._dtype = torch_dtype(precision)
        self._resolution = resolution
        # other pipelines do not check their weights either: it would make the start slower
        self._models = {
            part: opened.load_part(part, self._dtype, check_finite=False).to(device) for part in PREFIXES
        }
        stored = opened.alphas_cumprod
        self._alphas_cumprod = alphas_cumprod() if stored is None else stored.float().numpy()
        side = resolution // opened.architecture.latent_factor
        self.latent_shape = (opened.architecture.latent_channels, side, side)
        """(C, h, w)."""
        self._compiled = compiled
        if compiled:
            mode = "default" if device == "cpu" else "reduce-overhead"
            for part, method in (("unet", "predict_noise"), ("control", "detail_maps"), ("vae", "decode")):
                model = self._models[part]
                setattr(model, method, torch.compile(getattr(model, method), mode=mode))

    @torch.inference_mode()
    def run(
        self,
        scene: PictureLike,
        placements: Sequence[Placement],
        noise: NDArray[np.float32],
        sampling: Sampling,
    ) -> list[Composite]:
        """Draw pictures of one placement, or one picture each of several placements in the same scene.

        Args:
            scene: file, bytes, Pillow image or array.
            placements: one, or as many as there is noise.
            noise: (N, C, h, w) latents to start from.
            sampling: steps, guidance_scale, control_scale and timesteps; the sampler is DDIM with eta 0.
        """
        watch = Stopwatch()
        jobs = [self._job(scene, placement, sampling, noise, watch) for placement in placements]
        canvases = jobs[0].canvases if len(jobs) == 1 else [job.canvases[0] for job in jobs]
        for canvas in canvases:
            canvas.prepare()
        with self._measure(watch, ID_ENCODER):
            tokens = self._tokens(jobs, len(canvases))
        hints = self._tensor(np.stack([canvas.hint.hint for canvas in canvases]))
        with self._measure(watch, "sample"):
            latent = self._sample(tokens, hints, self._tensor(noise).float(), jobs[0], watch)
        with self._measure(watch, DECODE):
            decoded = self._models["vae"].decode(latent.to(self._dtype)).float()
            pictures = (decoded * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)
            images = pictures.permute(0, 2, 3, 1).cpu().numpy()
        for canvas, image in zip(canvases, images):
            canvas.paste(image)
        return [
            Composite(canvas.image, canvas.seed, tuple(canvas.regions), watch.seconds) for canvas in canvases
        ]

    def _job(
        self,
        scene: PictureLike,
        placement: Placement,
        sampling: Sampling,
        noise: NDArray[np.float32],
        watch: Stopwatch,
    ) -> Job:
        with watch.measure("read"):
            picture = load_picture(scene, "the scene", LARGEST.pixels).rgb
            resolved = resolve_placement(placement, picture, LARGEST.pixels)
        with watch.measure("prepare"):
            prepared = prepare_placement(resolved)
        schedule = ddim_schedule(self._alphas_cumprod, sampling.steps, timesteps=sampling.timesteps)
        seeds = list(range(len(noise)))
        return Job(picture, [prepared], sampling, schedule, seeds, self._resolution, noise, watch)

    def _tokens(self, jobs: Sequence[Job], count: int) -> Tensor:
        """ID tokens (2 N, T, D): of the references, then of the black picture."""
        references = np.stack([job.placements[0].reference.image for job in jobs])
        pictures = self._tensor(references.transpose(0, 3, 1, 2).astype(np.float32) / 255)
        black = pictures.new_zeros(1, 3, REFERENCE_SIZE, REFERENCE_SIZE)
        tokens = self._models["id_encoder"].encode_reference(torch.cat([pictures, black]))
        conditional, unconditional = tokens[:-1], tokens[-1:]
        return torch.cat([conditional.expand(count, -1, -1), unconditional.expand(count, -1, -1)])

    def _sample(self, tokens: Tensor, hints: Tensor, latent: Tensor, job: Job, watch: Stopwatch) -> Tensor:
        sampling, schedule = job.sampling, job.schedule
        control, unet = self._models["control"], self._models["unet"]
        both_hints = torch.cat([hints, hints])
        for timestep, coefficients in zip(schedule.timesteps.tolist(), schedule.coefficients.tolist()):
            if self._compiled:
                # allows CUDA graphs to overwrite the results of the step before
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            timesteps = torch.full((len(both_hints),), float(timestep), device=self.device)
            with self._measure(watch, "control"):
                details = control.detail_maps(both_hints, timesteps, tokens)
                scaled = [detail * sampling.control_scale for detail in details]
            with self._measure(watch, "denoise"):
                both = torch.cat([latent, latent]).to(self._dtype)
                epsilon = unet.predict_noise(both, timesteps, tokens, scaled).float()
                latent, _ = guided_step(latent, epsilon, sampling.guidance_scale, coefficients)
        return latent

    def _tensor(self, array: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self._dtype)

    @contextmanager
    def _measure(self, watch: Stopwatch, stage: str) -> Iterator[None]:
        with watch.measure(stage):
            yield
            if self.synchronous and self.device != "cpu":
                torch.cuda.synchronize()

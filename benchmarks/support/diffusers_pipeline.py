"""The baseline of latency.py for Stable Diffusion: the pipeline that diffusers makes of the checkpoint.

Place, mask and pasting are the runtime's own functions, so that pictures can be compared: the same noise
gives the same picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from benchmarks.support.graphs import DECODE, DENOISE, ENCODE, TEXT_ENCODER
from benchmarks.support.precisions import torch_dtype
from runtime.imaging.masked_scene import MaskedScene, mask_scene
from runtime.imaging.paste_back import feathered_region, paste_feathered
from runtime.imaging.pictures import load_picture
from runtime.imaging.sources import PictureLike
from runtime.imaging.target import load_target
from runtime.parameters import PLACEMENT_PARAMETERS, placement_parameters, sampling_parameters
from runtime.request import Placement, Sampling
from runtime.result import Composite, Stopwatch
from runtime.systems.stable_diffusion import DEFAULTS
from runtime.validation import LARGEST

_NO_VARIANCE = -100.0
"""Logarithm."""


class DiffusersPipeline:
    """Draws prompts with diffusers."""

    rows: Mapping[str, int] = {}
    """Not counted."""

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
            checkpoint: a folder in the layout of diffusers, for drawing from nothing or into a scene.
            resolution: side of the pictures that the networks draw.
            device: cpu or cuda.
            precision: of weights and activations: fp32, fp16 or bf16.
            compiled: run text encoder, UNet and VAE through `torch.compile`.
        """
        pipe = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch_dtype(precision)).to(device)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        channels = pipe.vae.config.latent_channels
        with torch.no_grad():
            # it samples the latent of a scene, and the runtime takes the mean
            pipe.vae.quant_conv.weight[channels:] = 0
            pipe.vae.quant_conv.bias[channels:] = _NO_VARIANCE
        side = resolution // pipe.vae_scale_factor
        self.latent_shape = (channels, side, side)
        """(C, h, w)."""
        self.synchronous = device == "cpu"
        """Whether to wait for every stage, to measure each; on a card calls return before they are done."""
        self._resolution = resolution
        self._sees_scene = pipe.unet.config.in_channels > channels
        self._pipe = pipe
        self._watch = Stopwatch()
        self._started: dict[str, float] = {}
        """Stage -> when its first call began, on the clock `time.perf_counter`."""
        for stage, module, name in (
            (TEXT_ENCODER, pipe.text_encoder, "forward"),
            (ENCODE, pipe.vae, "encode"),
            (DENOISE, pipe.unet, "forward"),
            (DECODE, pipe.vae, "decode"),
        ):
            call = getattr(module, name)
            if compiled:
                call = torch.compile(call, dynamic=False)
            setattr(module, name, self._timed(stage, call))

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
            sampling: steps and guidance scale; open ones are the system's defaults. The sampler is DDIM with
                eta 0.
        """
        watch = self._watch = Stopwatch()
        self._started = {}
        step_ends: list[float] = []

        def note_time(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            step_ends.append(time.perf_counter())
            return tensors

        parameters = sampling_parameters(sampling, DEFAULTS)
        with watch.measure("read"):
            picture = load_picture(scene, "the scene", LARGEST.pixels).rgb
        with watch.measure("prepare"):
            masked = [self._mask(picture, placement) for placement in placements]
        places: dict[str, Any] = {}
        if self._sees_scene:
            places["image"] = [_image(of) for of in masked]
            places["mask_image"] = [Image.fromarray(of.mask) for of in masked]
        samples = len(noise) // len(placements)
        drawn = self._pipe(
            prompt=[placement.prompt for placement in placements],
            height=self._resolution,
            width=self._resolution,
            num_inference_steps=parameters.steps,
            guidance_scale=parameters.guidance_scale,
            num_images_per_prompt=samples,
            latents=torch.from_numpy(noise).to(self._pipe.device, self._pipe.unet.dtype),
            callback_on_step_end=note_time,
            **places,
        ).images
        watch.add("sample", step_ends[-1] - self._started[DENOISE])
        masked = [of for of in masked for _ in range(samples)]
        with watch.measure("paste"):
            images = [
                paste_feathered(np.asarray(image), picture, of.geometry, of.paste)
                for image, of in zip(drawn, masked)
            ]
        return [
            Composite(image, seed, (feathered_region(of.geometry, of.paste),), watch.seconds)
            for seed, (image, of) in enumerate(zip(images, masked))
        ]

    def _mask(self, scene: NDArray[np.uint8], placement: Placement) -> MaskedScene:
        given = {name: getattr(placement, name) for name in PLACEMENT_PARAMETERS}
        parameters = placement_parameters(given, DEFAULTS)
        target = load_target(placement.box, placement.mask, scene, LARGEST.pixels, placement.keep_specks)
        size = (self._resolution, self._resolution)
        return mask_scene(scene, target, parameters.ratios, parameters.mode, size, self.latent_shape[1:])

    def _timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            self._started.setdefault(stage, time.perf_counter())
            with self._watch.measure(stage):
                result = call(*arguments, **named)
                if self.synchronous and self._pipe.device.type != "cpu":
                    torch.cuda.synchronize()
            return result

        return timed


def _image(scene: MaskedScene) -> Image.Image:
    pixels = ((scene.picture + 1) * 127.5).round().astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 2, 0))

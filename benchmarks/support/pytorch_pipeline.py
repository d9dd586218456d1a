"""The baseline of latency.py: the same checkpoint as a plain PyTorch pipeline of diffusers modules.

As in diffusers' own ControlNet pipelines, the ControlNet runs at every step and for both halves of the
guidance, nothing is kept from one picture to the next, and the samples of a placement are a batch.
Pre-processing, schedule and pasting are the runtime's own functions, so that pictures can be compared: the
same noise gives the same picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.support.graphs import DECODE, ID_ENCODER
from benchmarks.support.networks import architecture_of
from benchmarks.support.precisions import torch_dtype
from benchmarks.support.sampling_step import guided_step
from engines.manifest import MANIFEST, read_manifest
from runtime.diffusion.ddim import ddim_schedule
from runtime.diffusion.noise_schedule import alphas_cumprod
from runtime.imaging.pictures import load_picture
from runtime.imaging.sources import PictureLike
from runtime.parameters import (
    PLACEMENT_PARAMETERS,
    SamplingParameters,
    placement_parameters,
    sampling_parameters,
)
from runtime.request import Placement, Sampling
from runtime.result import Composite, Stopwatch
from runtime.systems.anydoor import DEFAULTS, AnyDoorPlacement, Preprocessing
from runtime.validation import LARGEST
from training.network.architecture import REFERENCE_SIZE
from training.network.checkpoint import Checkpoint, read_checkpoint
from training.network.modules import AnyDoor
from training.network.official_keys import PREFIXES

_NOISE_DEVIATION = 0.02


def noise_checkpoint(bundle: Path, device: str, precision: str) -> Checkpoint:
    """Make a checkpoint of noise, on the device, for the network that a bundle or skeleton was exported from.

    Args:
        bundle: its directory.
        device: cpu or cuda.
        precision: of the weights: fp32, fp16 or bf16.
    """
    architecture, dtype = architecture_of(read_manifest(bundle / MANIFEST)), torch_dtype(precision)
    with torch.device("meta"):
        shapes = AnyDoor(architecture).official_shapes()
    tensors = {
        key: torch.empty(shape, dtype=dtype, device=device).normal_(std=_NOISE_DEVIATION)
        for key, shape in shapes.items()
    }
    return Checkpoint(Path("noise"), architecture, tensors)


class PyTorchPipeline:
    """Composites with PyTorch."""

    rows: Mapping[str, int] = {}
    """Not counted."""

    def __init__(
        self,
        checkpoint: Path | Checkpoint,
        resolution: int,
        device: str = "cpu",
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        """Load a checkpoint.

        Args:
            checkpoint: the file that the bundle was built from, or an opened one.
            resolution: side of the pictures that the networks draw.
            device: cpu or cuda.
            precision: of weights and activations: fp32, fp16 or bf16.
            compiled: run UNet, ControlNet and VAE through `torch.compile`; on a card with channels last and
                CUDA graphs.
        """
        opened = read_checkpoint(checkpoint) if isinstance(checkpoint, Path) else checkpoint
        self.device = device
        self.synchronous = device == "cpu"
        """Whether to wait for every stage, to measure each; on a card calls return before they are done."""
        self._defaults = {**DEFAULTS, **opened.defaults}
        self._dtype = torch_dtype(precision)
        self._system = Preprocessing(resolution, REFERENCE_SIZE)
        # other pipelines do not check their weights either: it would make the start slower
        self._models: dict[str, Any] = {
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
                if device != "cpu":
                    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                # another batch size is another program: one for all sizes would be slower
                compiled_method = torch.compile(getattr(model, method), mode=mode, dynamic=False)
                setattr(model, method, compiled_method)

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
            sampling: steps, guidance scale, control scale and timesteps; open ones are the checkpoint's
                defaults. The sampler is DDIM with eta 0.
        """
        watch = Stopwatch()
        parameters = sampling_parameters(sampling, self._defaults)
        with watch.measure("read"):
            picture = load_picture(scene, "the scene", LARGEST.pixels).rgb
        prepared = [self._prepare(picture, placement, watch) for placement in placements]
        prepared *= len(noise) // len(prepared)
        with self._measure(watch, ID_ENCODER):
            tokens = self._tokens(prepared)
        hints = self._tensor(np.stack([of.hint.hint for of in prepared]))
        with self._measure(watch, "sample"):
            latent = self._sample(tokens, hints, self._tensor(noise).float(), parameters, watch)
        with self._measure(watch, DECODE):
            decoded = self._models["vae"].decode(latent.to(self._dtype)).float()
            pictures = (decoded * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)
            drawn = pictures.permute(0, 2, 3, 1).cpu().numpy()
        with watch.measure("paste"):
            images = [self._system.finish(image, picture, of) for image, of in zip(drawn, prepared)]
        return [
            Composite(image, seed, (of.region,), watch.seconds)
            for seed, (image, of) in enumerate(zip(images, prepared))
        ]

    def _prepare(self, scene: NDArray[np.uint8], placement: Placement, watch: Stopwatch) -> AnyDoorPlacement:
        given = {name: getattr(placement, name) for name in PLACEMENT_PARAMETERS}
        parameters = placement_parameters(given, self._defaults)
        return self._system.prepare(scene, placement, parameters, LARGEST, watch)

    def _tokens(self, prepared: Sequence[AnyDoorPlacement]) -> Tensor:
        """ID tokens (2 N, T, D): of the references, then of the black picture."""
        distinct = list({id(of): of for of in prepared}.values())
        references = np.stack([of.reference.image for of in distinct])
        pictures = self._tensor(references.transpose(0, 3, 1, 2).astype(np.float32) / 255)
        black = pictures.new_zeros(1, 3, REFERENCE_SIZE, REFERENCE_SIZE)
        tokens = self._models["id_encoder"].encode_reference(torch.cat([pictures, black]))
        conditional, unconditional = tokens[:-1], tokens[-1:]
        count = len(prepared)
        return torch.cat([conditional.expand(count, -1, -1), unconditional.expand(count, -1, -1)])

    def _sample(
        self,
        tokens: Tensor,
        hints: Tensor,
        latent: Tensor,
        sampling: SamplingParameters,
        watch: Stopwatch,
    ) -> Tensor:
        schedule = ddim_schedule(self._alphas_cumprod, sampling.steps, timesteps=sampling.timesteps)
        control, unet = self._models["control"], self._models["unet"]
        control_scale = 1.0 if sampling.control_scale is None else sampling.control_scale
        both_hints = torch.cat([hints, hints])
        for timestep, coefficients in zip(schedule.timesteps.tolist(), schedule.coefficients.tolist()):
            if self._compiled:
                # allows CUDA graphs to overwrite the results of the step before
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            timesteps = torch.full((len(both_hints),), float(timestep), device=self.device)
            with self._measure(watch, "control"):
                details = control.detail_maps(both_hints, timesteps, tokens)
                scaled = [detail * control_scale for detail in details]
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

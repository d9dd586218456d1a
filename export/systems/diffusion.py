"""Defines what the graphs of all systems share: the step's guidance and update, encoder and decoder of
pictures, and their signatures.

Value ranges: `timestep` 0..999; `coefficients` as `runtime.diffusion.ddim` defines them; `carry` noise, or
what the sampler keeps of the step before; `picture` -1..1 RGB; `decoded` -1..1 before clipping; `image`
0..255 RGB. Index inputs count from 0.

The decode graph takes one picture at a time: a single one keeps a card busy, and its intermediate results, by
far the largest of all graphs, would grow with the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from engines.errors import AnyDoorError
from engines.spec import SAMPLES, BankSpec, Dimension, GraphSpec, TensorSpec
from export.systems.system import Size
from training.network.architecture import LATENT_SCALE, DiffusionArchitecture
from training.network.modules import DiffusionNetwork

DENOISE = "denoise"
ENCODE = "encode"
DECODE = "decode"

LARGEST_SIDE = 8192
"""Of a picture, in pixels."""

CONDITIONS = "conditions"
"""Dimension: sets of tokens in a call, conditional and unconditional ones."""


def f32(name: str, *shape: Dimension) -> TensorSpec:
    """Returns a float32 input or output."""
    return TensorSpec(name, "float32", shape)


def index(name: str, dimension: str) -> TensorSpec:
    """Returns an input of indices."""
    return TensorSpec(name, "int32", (dimension,))


def latent_shape(architecture: DiffusionArchitecture, size: Size) -> tuple[int, int, int]:
    """Returns (C, h, w) of the latent of a picture."""
    height, width = (side // architecture.latent_factor for side in size)
    return architecture.latent_channels, height, width


def check_size(architecture: DiffusionArchitecture, size: Size) -> None:
    """Refuses a picture size that the network cannot halve often enough, or that no machine has memory for.

    Raises:
        AnyDoorError: it is such a size.
    """
    step = architecture.side_step
    if max(size) > LARGEST_SIDE:
        raise AnyDoorError(f"--resolution must be at most {LARGEST_SIDE}, not {max(size)}")
    if any(side < step or side % step for side in size):
        height, width = size
        given = str(width) if width == height else f"{width}x{height}"
        raise AnyDoorError(f"--resolution must be a multiple of {step} for this network, not {given}")


def step_spec(
    latent: tuple[int, int, int],
    numbers: Sequence[TensorSpec],
    tensors: Sequence[TensorSpec],
    banks: tuple[BankSpec, ...],
    fixed: Sequence[TensorSpec] = (),
) -> GraphSpec:
    """Returns the signature of a step graph.

    Args:
        latent: (C, h, w).
        numbers: inputs that change at every step.
        tensors: those of the banks.
        banks: which tensors belong together.
        fixed: inputs of the samples that stay the same.
    """
    return GraphSpec(
        DENOISE,
        "step",
        inputs=(f32("latent", SAMPLES, *latent), f32("carry", SAMPLES, *latent), *fixed, *numbers, *tensors),
        outputs=(f32("next_latent", SAMPLES, *latent), f32("epsilon", SAMPLES, *latent)),
        banks=banks,
        per_step=tuple(tensor.name for tensor in numbers),
        feedback={"latent": "next_latent", "carry": "epsilon"},
    )


def encode_spec(latent: tuple[int, int, int], size: Size) -> GraphSpec:
    """Returns the signature of the encoder of pictures."""
    return GraphSpec(
        ENCODE, "scene", inputs=(f32("picture", 1, 3, *size),), outputs=(f32("latent", 1, *latent),)
    )


def decode_spec(latent: tuple[int, int, int], size: Size) -> GraphSpec:
    """Returns the signature of the decode graph."""
    return GraphSpec(
        DECODE,
        "decode",
        inputs=(f32("latent", 1, *latent),),
        outputs=(TensorSpec("image", "uint8", (1, *size, 3)), f32("decoded", 1, 3, *size)),
    )


def guided(
    row_epsilon: Tensor, guidance_scale: Tensor, conditional_row: Tensor, unconditional_row: Tensor
) -> Tensor:
    """Classifier-free guidance: epsilon of rows (R, C, h, w) -> of samples (N, C, h, w).

    A sample without guidance names the same row twice, and the guidance term vanishes exactly.
    """
    conditional = row_epsilon.index_select(0, conditional_row)
    unconditional = row_epsilon.index_select(0, unconditional_row)
    return unconditional + per_sample(guidance_scale) * (conditional - unconditional)


def weighted_sum(coefficients: Tensor, *terms: Tensor) -> Tensor:
    """Sum of tensors (N, C, h, w), each times its column of coefficients (N, K)."""
    first, *others = (per_sample(of) * term for of, term in zip(coefficients.unbind(1), terms))
    for other in others:
        first = first + other
    return first


def per_sample(values: Tensor) -> Tensor:
    """Maps (N,) to (N, 1, 1, 1)."""
    return values[:, None, None, None]


class EncodeGraph(nn.Module):
    """Picture -> the mean of its latent: a sample would make the result depend on noise that nobody chose."""

    dtype: torch.dtype

    def __init__(self, model: DiffusionNetwork) -> None:
        super().__init__()
        self.model = model
        self.dtype = model.vae.quant_conv.weight.dtype

    def forward(self, picture: Tensor) -> Tensor:
        """Returns (1, 3, H, W) in -1..1 -> (1, C, h, w)."""
        mean: Tensor = self.model.encode(picture.to(self.dtype)).mean
        return LATENT_SCALE * mean.float()


class DecodeGraph(nn.Module):
    """Latent -> picture."""

    dtype: torch.dtype

    def __init__(self, model: DiffusionNetwork) -> None:
        super().__init__()
        self.model = model
        self.dtype = model.vae.post_quant_conv.weight.dtype

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (1, C, h, w) to (1, H, W, 3) uint8 RGB, and the same before clipping, (1, 3, H, W) in
        -1..1."""
        decoded = self.model.decode(latent.to(self.dtype)).float()
        image = (decoded * 127.5 + 127.5).clamp(0, 255).round().permute(0, 2, 3, 1)
        # TensorRT knows uint8 at the border of a network only: nothing may follow the cast
        return image.to(torch.uint8), decoded


_UNMASKED = "sdpa_unmasked"


def without_masks(model: nn.Module) -> None:
    """Keeps a model of transformers from making masks while it is traced.

    It makes some that mask nothing, and PyTorch guards against rows that are all masked. For an
    implementation that it does not know it makes none; attention that is causal is told so.
    """
    AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
    model.set_attn_implementation(_UNMASKED)  # type: ignore[operator]

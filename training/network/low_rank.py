"""Trains low-rank updates of frozen layers: W x + B A x.

A has normal random numbers and B is zero, so training starts at the network as it is. Source: Hu et al., 2021
(LoRA), section 4.1, with alpha = rank. `training.network.lora` merges what is written here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from training.network.checkpoint import write_tensors

ATTENTION = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
"""Part of Stable Diffusion -> how the names of its layers end that get an update: the projections of all
attentions."""


_STORED_AS = {"unet": "unet.", "text_encoder": "text_encoder.text_model."}
"""Part -> how its keys begin in files; `transformers` had a module more in its text encoder once."""


class LowRankLinear(nn.Module):
    """A frozen linear layer with an update that learns."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        down = torch.randn(rank, base.in_features, generator=generator) / rank
        self.down = nn.Parameter(down.to(base.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        update = x.to(self.down.dtype) @ self.down.T @ self.up.T
        output: Tensor = self.base(x)
        return output + update.to(output.dtype)


def add_low_rank(module: nn.Module, endings: Sequence[str], rank: int, seed: int = 0) -> None:
    """Gives the linear layers whose names end so an update; everything else is frozen.

    Args:
        module: is changed.
        endings: last parts of names, like those of `ATTENTION`.
        rank: of the updates, at least 1.
        seed: of the random numbers.

    Raises:
        ValueError: no layer has such a name.
    """
    module.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    endings = tuple(f".{ending}" for ending in endings)
    found = [
        (name, layer)
        for name, layer in module.named_modules()
        if f".{name}".endswith(endings) and isinstance(layer, nn.Linear)
    ]
    if not found:
        raise ValueError(f"no linear layer's name ends with {', '.join(endings)}")
    for name, layer in found:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, LowRankLinear(layer, rank, generator))


def low_rank_layers(module: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Gives the layers that have an update, by the names that they had without it."""
    for name, layer in module.named_modules():
        if isinstance(layer, LowRankLinear):
            yield name, layer


def write_low_rank(path: str | Path, parts: Mapping[str, nn.Module]) -> None:
    """Writes the updates as `load_lora_weights` of diffusers reads them: a .safetensors file, atomically.

    Args:
        path: of the file; diffusers expects pytorch_lora_weights.safetensors in a folder.
        parts: unet, and text_encoder if it has updates -> the module.
    """
    tensors = {}
    for part, module in parts.items():
        for name, layer in low_rank_layers(module):
            tensors[f"{_STORED_AS[part]}{name}.lora_A.weight"] = layer.down.detach().cpu()
            tensors[f"{_STORED_AS[part]}{name}.lora_B.weight"] = layer.up.detach().cpu()
    write_tensors(path, tensors, {"format": "pt"})

"""Turns tokens of an image encoder into ID tokens: AnyDoor's projector, and IMPRINT's content adapter."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class AdapterBlock(nn.Module):
    """A transformer block that normalises first: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (N, T, width) to (N, T, width)."""
        # query, key and value of a head lie beside each other, as in Paint-by-Example (encoders/xf.py)
        qkv = self.qkv(self.norm1(tokens)).unflatten(-1, (self.heads, 3, -1)).transpose(2, 3).flatten(2)
        # split one by one: the rules that look for attention in an exported graph know this form
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        found = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(found)
        return tokens + self.mlp(self.norm2(tokens))  # type: ignore[no-any-return]


class ContentAdapter(nn.Linear):
    """A linear layer, and transformer blocks and a normalisation before it if there are any blocks.

    Without blocks it is AnyDoor's projector, to the names of its weights. IMPRINT takes its content adapter
    from ObjectStitch (Song et al., 2023), whose weights are not public; the blocks are those of the public
    reimplementation (bcmi/ObjectStitch-Image-Composition, ldm/modules/encoders/modules.py). Every token goes
    through; the paper of ObjectStitch makes 77 of 257.
    """

    def __init__(self, width: int, token_width: int, layers: int = 0, heads: int = 1) -> None:
        super().__init__(width, token_width)
        if layers:
            self.blocks = nn.Sequential(*(AdapterBlock(width, heads) for _ in range(layers)))
            self.norm = nn.LayerNorm(width)
        self.layers = layers

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (N, T, width) to (N, T, token width)."""
        return super().forward(self.norm(self.blocks(tokens)) if self.layers else tokens)

    @torch.no_grad()
    def skip_blocks(self) -> None:
        """Sets what the blocks add to 0: what is left are the normalisation and the linear layer."""
        if not self.layers:
            return
        for block in self.blocks:
            assert isinstance(block, AdapterBlock)
            for last in (block.out, block.mlp[-1]):
                assert isinstance(last, nn.Linear)
                last.weight.zero_()
                last.bias.zero_()

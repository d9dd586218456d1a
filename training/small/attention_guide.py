"""Guides the cross-attention of a small model in training to the ID tokens that belong to a cell.

What a network needs to reproduce an object is in its ID tokens, and where in the box a cell lies determines
which of them it needs. The published model inherits attention that was trained on billions of pictures. A
model that starts from nothing learns this late: after 160,000 samples the first heads of an example model
were still spread over all tokens (cross-entropy 5.47 of 5.55 nats), and it drew an object's colours without
its shape. Here the first heads of each cross-attention are trained to look where the cell's content is in the
reference, if the object were seen from the same side: one head at the middle of the cell, or four at the
middles of its quarters, because a head carries one place at a time and a cell is wider than a token. The
other heads and the exported graphs do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from runtime.errors import InputError

GUIDED_HEADS = (1, 4)
"""How many heads of a layer can be guided."""

SPREAD = 1.2
"""Standard deviation, in tokens, of where one head should look: views differ, and the places are rounded."""

QUARTER_SPREAD = 0.33
"""The same of four heads, in cells."""

SMALLEST_SPREAD = 0.4
"""The least of theirs, in tokens: a head cannot look between two tokens more sharply."""


def check_guided_heads(count: int) -> None:
    """Refuses a number of heads that cannot be guided.

    Raises:
        InputError: says which numbers can.
    """
    if count not in GUIDED_HEADS:
        raise InputError(f"guided_heads is {count}; expected {' or '.join(map(str, GUIDED_HEADS))}")


def cross_attention(parts: Iterable[nn.Module]) -> dict[str, Attention]:
    """Returns the layers of some parts that look at the tokens, by name, except the middle's."""
    return {
        f"{index}.{name}": layer
        for index, part in enumerate(parts)
        for name, layer in part.named_modules()
        if isinstance(layer, Attention) and layer.is_cross_attention and "mid_block" not in name
    }


class AttentionGuide:
    """Measures how far off the first heads of each cross-attention look, except the middle's."""

    def __init__(self, parts: Iterable[nn.Module], heads: int = 1) -> None:
        """Changes how the parts compute their cross-attention, not the result.

        Args:
            parts: of the network.
            heads: how many are guided; see `GUIDED_HEADS`.

        Raises:
            InputError: a layer has fewer.
        """
        self._heads = heads
        self.seen: dict[str, Tensor] = {}
        """Layer -> logarithms of where its guided heads looked in the last pass, (N, heads, cells, 1 + T)."""
        for name, layer in cross_attention(parts).items():
            if layer.heads < heads:
                raise InputError(f"{heads} heads are to be guided, and '{name}' has {layer.heads}")
            layer.set_processor(_RecordedAttention(self.seen, name, heads))

    def clear(self) -> None:
        """Forgets the last forward pass; to be called before each."""
        self.seen.clear()

    def loss(self, places: Tensor) -> Tensor:
        """Computes the cross-entropy, in nats, between where heads look and where they should.

        places: (N, h, w, 2), see `matching_places`; levels of the network with fewer cells take means of it.
            The loss is the mean over the cells whose place is known.
        """
        total = places.new_zeros(())
        # tokens that the finest cell is wide: the same everywhere in a picture, in both directions
        steps = [torch.diff(places[..., axis], dim=1 + axis).flatten(1) for axis in (0, 1)]
        finest = torch.cat(steps, 1).nanmean(1).nan_to_num(1)[:, None, None, None]
        for looks in self.seen.values():
            tokens = round((looks.shape[3] - 1) ** 0.5)  # per side, but for the class token
            coarser = places.shape[1] // round(looks.shape[2] ** 0.5)
            wanted = F.avg_pool2d(places.permute(0, 3, 1, 2), coarser)
            targets, spread = self._targets(wanted, finest * coarser)
            known = targets.isfinite().all(3)
            # all cells are computed, because picking out those that count waits for a card
            place = targets.masked_fill(~known[..., None], 0)
            grid = torch.arange(tokens, device=places.device) + 0.5
            down, across = ((grid - place[..., axis, None]).square() for axis in (0, 1))
            distance = (down[..., :, None] + across[..., None, :]).flatten(3)
            should = (-distance / (2 * spread**2)).softmax(3)
            off = -(should * looks[..., 1:]).sum(3)
            total = total + (off * known).sum() / known.sum().clamp(min=1)
        return total / max(len(self.seen), 1)

    def _targets(self, wanted: Tensor, width: Tensor) -> tuple[Tensor, Tensor | float]:
        """Returns where each head should look, (N, heads, cells, 2), and how sharply, in tokens.

        Args:
            wanted: (N, 2, h, w), the middles of the cells.
            width: (N, 1, 1, 1), of a cell.
        """
        middles = wanted.flatten(2).transpose(1, 2)[:, None]
        if self._heads == 1:
            return middles, SPREAD
        # of quarters from the middle of their cell, in cells; made where it is used, as a captured step must
        quarters = torch.cartesian_prod(*2 * [torch.arange(2, device=wanted.device) / 2 - 0.25])
        return middles + quarters[:, None] * width, (QUARTER_SPREAD * width).clamp(min=SMALLEST_SPREAD)


class _RecordedAttention:
    """Attention written out, because the fused one does not give its probabilities."""

    def __init__(self, seen: dict[str, Tensor], name: str, heads: int) -> None:
        self._seen, self._name, self._heads = seen, name, heads

    def __call__(
        self, layer: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for project, x in (
                (layer.to_q, hidden_states),
                (layer.to_k, encoder_hidden_states),
                (layer.to_v, encoder_hidden_states),
            )
        )
        looks = (query @ key.transpose(-1, -2) * layer.scale).log_softmax(-1)
        self._seen[self._name] = looks[:, : self._heads]
        found = (looks.exp() @ value).transpose(1, 2).flatten(2)
        projection, dropout = layer.to_out
        result: Tensor = dropout(projection(found))
        return result

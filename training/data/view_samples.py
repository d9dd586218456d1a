"""Makes samples of IMPRINT's stage 1 from rendered objects whose views all fit a card's memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.diffusion.noise_schedule import TRAIN_TIMESTEPS
from runtime.imaging.masks import MASK_THRESHOLD
from training.data.composites import Composites
from training.data.device import (
    change_light,
    draw_tenths,
    flipped,
    generator,
    prepare_references,
    span,
)
from training.data.matching_places import box_places
from training.data.pairs import SMALLEST_AREA, CommonRules
from training.data.rendered import RenderedViews
from training.network.architecture import REFERENCE_SIZE


@dataclass(frozen=True)
class ViewSamples(Composites):
    """`Composites` of one source, `RenderedViews`, that are drawn in whole batches as well."""

    _loaded: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def batch(self, numbers: range, device: torch.device) -> dict[str, Tensor]:
        """Draws a batch in a device's memory, which takes all views at the first call.

        Names, shapes and dtypes are those of samples in a batch, and so are the distributions.
        """
        rules, rng, count = self.make.rules, generator(self.seed, numbers, device), len(numbers)
        views, pairs = self._on(device)
        rows = pairs[torch.randint(len(pairs), (count,), generator=rng, device=device)]
        shares = torch.rand(8, count, generator=rng, device=device)
        mirror, dropped = shares[0] < rules.mirror, shares[1] < self.drop
        first, second = (
            flipped(views[rows[:, 0], rows[:, column]].permute(0, 3, 1, 2), mirror) for column in (1, 2)
        )
        first = flipped(first, shares[2] < rules.flip)
        lit = change_light(first[:, :3].float(), shares[3] < rules.brighten, shares[4:6])
        ratios = [draw_tenths(rules.reference_ratios, share) for share in shares[6:]]
        shown, _ = prepare_references(lit, first[:, 3] > MASK_THRESHOLD, ratios[0], REFERENCE_SIZE)
        inside, side = second[:, 3] > MASK_THRESHOLD, rules.resolution
        drawn, mask = prepare_references(second[:, :3].float(), inside, ratios[1], side)
        everything = torch.ones(count, 1, side, side, device=device)
        sample = {
            "reference": shown / 255,
            "picture": drawn / 127.5 - 1,
            "mask": everything,
            "counts": everything,
            "dropped": dropped.float(),
            "timestep": torch.randint(TRAIN_TIMESTEPS, (count,), generator=rng, device=device),
        }
        for name in ("noise", "posterior_noise"):
            sample[name] = torch.randn(count, *self.latent_shape, generator=rng, device=device)
        if self.token_grid:
            boxes = _boxes(mask > MASK_THRESHOLD, rules)
            places = box_places(*boxes, side, self.latent_shape[-1], self.token_grid)
            sample["places"] = places.masked_fill(dropped.view(-1, 1, 1, 1), math.nan)
        return sample

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns all views (N, V, S, S, 4) uint8, and what can be drawn: (M, 3), an object and two of its
        views."""
        if device not in self._loaded:
            [(source, _)] = self.sources
            assert isinstance(source, RenderedViews)
            store = source.store
            views = torch.cat([store.resident(name, device) for name in ("references", "scenes")], 1)
            areas = (views[..., 3] > MASK_THRESHOLD).sum((2, 3))
            fit = areas >= SMALLEST_AREA * views.shape[2] * views.shape[3]
            same = torch.eye(views.shape[1], dtype=torch.bool, device=device)
            chosen = same if source.window == 0 else ~same
            self._loaded[device] = views, (fit[:, :, None] & fit[:, None, :] & chosen).nonzero()
        return self._loaded[device]


def _boxes(inside: Tensor, rules: CommonRules) -> tuple[Tensor, Tensor]:
    """Returns the objects' places as `expand` makes them: first row and column (N, 2), and those behind the
    last."""
    spans = [span(inside.any(axis)) for axis in (2, 1)]
    first, length = (torch.stack([each[part] for each in spans], 1) for part in (1, 2))
    middle, half = first + 0.5 * length.double(), rules.box_ratio * (length + 1).double() * 0.5
    ends = ((middle + sign * half).long() for sign in (-1, 1))
    start, end = (edge.clamp(0, inside.shape[1]) for edge in ends)
    return start, end

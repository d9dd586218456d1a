"""Where does a network look in the reference: at the matching place, and how sharply?

    python benchmarks/studies/attention_places.py
    python benchmarks/studies/attention_places.py --checkpoint FILE --heads 4

A cell of the latent needs the part of the reference that it shows. The study measures the cross-attention of
the guided heads (see `training.small.attention_guide`) from noise alone, at t = 999, in patch tokens of the
reference: the offset from the matching place of the mean place that the heads of a cell look at, and the
spread of a head about its own mean place, both as root mean squares over rows and columns together. What a
head brings is an average over its spread; detail finer than that cannot pass.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.studies.latent_errors import load_network, prepare
from benchmarks.support.example import CHECKPOINT, example_checkpoint
from benchmarks.support.machine import describe
from benchmarks.support.numbers import positive
from benchmarks.support.results import RESULTS, require_writable, write_results
from benchmarks.support.truth_set import truth_pairs
from engines.errors import AnyDoorError
from runtime.errors import InputError
from runtime.progress_bar import ProgressBar
from training.data.matching_places import matching_places
from training.data.pairs import as_reference
from training.small.attention_guide import GUIDED_HEADS, AttentionGuide
from training.systems.anydoor import guided_parts

TIMESTEP = 999


def squares(looks: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Computes squared offsets and spreads of the cells whose place is known, (N,) each, in tokens.

    Args:
        looks: probabilities (heads, cells, tokens).
        places: (h, w, 2), see `matching_places`; levels with fewer cells take means of it.
    """
    cells, tokens = round(looks.shape[1] ** 0.5), round(looks.shape[2] ** 0.5)
    wanted = F.avg_pool2d(places.permute(2, 0, 1)[None], places.shape[0] // cells)[0].flatten(1).T
    grid = torch.cartesian_prod(*2 * [torch.arange(tokens) + 0.5])
    middles = looks @ grid
    spread = (looks * (grid - middles[:, :, None]).square().sum(-1)).sum(-1).mean(0)
    offset = (middles.mean(0) - wanted).square().sum(-1)
    known = wanted.isfinite().all(-1)
    return offset[known], spread[known]


@torch.no_grad()
def study(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all layers."""
    model, resolution = load_network(options.checkpoint, options.resolution)
    guide, sums = AttentionGuide(guided_parts(model), options.heads), defaultdict[str, list[Any]](list)
    for seed, pair in enumerate(ProgressBar(truth_pairs(options.count), "looking", total=options.count)):
        prepared = prepare(model, pair, resolution)
        noise = np.random.default_rng(seed).standard_normal((1, *prepared.truth.shape), np.float32)
        reference = torch.from_numpy(as_reference(prepared.pair.reference))[None]
        hint = torch.from_numpy(prepared.pair.hint)[None]
        tokens = model.encode_reference(reference)
        model(torch.from_numpy(noise), torch.tensor([TIMESTEP]), tokens, hint)
        side = round((tokens.shape[1] - 1) ** 0.5)
        places = torch.from_numpy(matching_places(prepared.pair.hint[3] > 0, noise.shape[-1], side))
        for name, looks in guide.seen.items():
            sums[name].append(squares(looks[0, :, :, 1:].softmax(-1), places))  # but for the class token
    rows = []
    for name, pairs in sums.items():
        offset, spread = (float(torch.cat(each).mean().sqrt()) for each in zip(*pairs, strict=True))
        part, _, layer = name.partition(".")
        full = f"{('unet.up_blocks', 'control')[int(part)]}.{layer}"
        rows.append({"layer": full, "offset": offset, "spread": spread})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 if it cannot be run."""
    parser = argparse.ArgumentParser(
        prog="attention_places.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help=f"default: {CHECKPOINT}")
    parser.add_argument(
        "--heads", type=int, default=4, choices=GUIDED_HEADS, help="that are guided; default: 4"
    )
    parser.add_argument("--count", type=int, default=100, help="held-out pairs; default: 100")
    parser.add_argument(
        "--resolution", type=positive(int), help="of the network; default: what it was trained for"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "attention-places-small.json")
    options = parser.parse_args(arguments)
    try:
        if options.count < 1:
            raise InputError("--count is at least 1")
        require_writable(options.output)
        options.checkpoint = options.checkpoint or example_checkpoint()
        rows = study(options)
    except (AnyDoorError, OSError) as error:
        print(f"attention_places.py: {error}", file=sys.stderr)
        return 2
    settings = {"checkpoint": options.checkpoint.name, "heads": options.heads, "count": options.count}
    write_results(options.output, {"machine": describe(), "settings": settings, "rows": rows})
    for row in rows:
        print(f"{row['layer']:<80} offset {row['offset']:.2f}, spread {row['spread']:.2f} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())

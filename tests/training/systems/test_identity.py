"""The small ID encoder: what its tokens tell before it has learned anything, and that it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import TINY
from training.data.pairs import PairRules
from training.data.view_store import ViewStore, draw_views
from training.loop import train
from training.loop_settings import LoopSettings
from training.network.modules import IDEncoder
from training.systems.identity import IdentityTask, TwoViews, start_with_pixels


def fit(tokens: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of the variance that a linear function of half of the tokens does not tell of the others."""
    tokens = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1).double()
    half, wanted = len(tokens) // 2, wanted.double()
    function = torch.linalg.lstsq(tokens[:half], wanted[:half]).solution
    error = (tokens[half:] @ function - wanted[half:]).square().mean()
    return float(error / wanted[half:].var(dim=0).mean())


@torch.no_grad()
def test_a_fresh_token_tells_its_colours_and_its_place() -> None:
    torch.manual_seed(0)
    encoder, smooth = IDEncoder(TINY), torch.rand(16, 3, 28, 28)
    random = IDEncoder(TINY)
    start_with_pixels(encoder)
    pictures = torch.nn.functional.interpolate(smooth, (224, 224), mode="bilinear")
    halves = torch.nn.functional.adaptive_avg_pool2d(pictures, 32)  # four values per patch and colour
    wanted = torch.nn.functional.pixel_unshuffle(halves, 2).flatten(2).transpose(1, 2).flatten(0, 1)
    place = torch.cartesian_prod(torch.arange(16), torch.arange(16)).repeat(16, 1).float()
    found = {
        name: each.features(pictures)[:, 1:].flatten(0, 1)
        for name, each in (("pixels", encoder), ("random", random))
    }
    assert fit(found["pixels"], wanted) < 0.05
    assert fit(found["random"], wanted) > 0.3
    assert fit(found["pixels"], place) < 0.15


def test_a_batch_in_a_device_s_memory_shows_the_same_views(tmp_path: Path) -> None:
    """With one ratio there are four pictures of an object: two views, each as it is and mirrored."""
    draw_views(tmp_path, 2)
    store, rules = ViewStore(tmp_path), PairRules(resolution=32, brighten=0.0)
    views = TwoViews(store, 0, rules)
    found = views.batch(range(24), torch.device("cpu"))["views"]
    assert (found.shape, found.dtype) == ((24, 2, 3, 224, 224), torch.float32)
    possible = np.stack([views[number]["views"] for number in range(120)])
    for pair in found.numpy():
        # the two are chosen apart: mirrored or not, and one of four ratios
        off = [np.abs(possible[:, index] - pair[index]).max((1, 2, 3)) for index in range(2)]
        assert max(distances.min() for distances in off) <= 2.01 / 255

    lit = TwoViews(store, 0, PairRules(resolution=32, brighten=1.0))
    batch = lit.batch(range(50), torch.device("cpu"))["views"]
    singly = np.stack([lit[number]["views"] for number in range(50)])
    assert float(batch.mean()) == pytest.approx(float(singly.mean()), abs=0.01)
    spread = batch.flatten(2).mean(2).std()
    assert float(spread) == pytest.approx(float(singly.reshape(100, -1).mean(1).std()), rel=0.2)


def test_it_learns_to_tell_objects_apart(tmp_path: Path) -> None:
    """Four objects, each time in other light and size: more and more the other view is the nearest one."""
    draw_views(tmp_path / "views", 4)
    torch.manual_seed(0)
    task = IdentityTask(TINY, ViewStore(tmp_path / "views"), PairRules(resolution=32))
    batches = [
        {"views": torch.from_numpy(np.stack([task.dataset()[4 * n + k]["views"] for k in range(4)]))}
        for n in range(1000, 1003)
    ]

    def measured(name: str) -> float:
        with torch.no_grad():
            return float(np.mean([float(task.loss(task.module, batch)[name]) for batch in batches]))

    contrast, detail = measured("contrast"), measured("detail")
    train(task, LoopSettings(steps=30, batch=4, learning_rate=2e-3), tmp_path / "identity")
    assert measured("contrast") < 0.8 * contrast
    assert measured("detail") < 0.8 * detail

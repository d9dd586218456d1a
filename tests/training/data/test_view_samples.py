"""IMPRINT's samples of views, in whole batches: the same as one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from training.data.composites import ViewMaker
from training.data.pairs import CommonRules
from training.data.rendered import RenderedViews
from training.data.view_samples import ViewSamples
from training.data.view_store import draw_views

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    draw_views(folder, 1)
    return folder


def open_samples(folder: Path, window: int | None = None, drop: float = 0.0) -> ViewSamples:
    """With nothing but the choice of views left to chance."""
    rules = CommonRules(
        resolution=64, flip=0.0, mirror=0.0, brighten=0.0, reference_ratios=(1.2, 1.2), crop_ratios=(2, 2)
    )
    source = RenderedViews(folder)
    source.window = window
    return ViewSamples([(source, 1.0)], ViewMaker(rules), (4, 8, 8), 0, drop, token_grid=16)


@pytest.mark.parametrize("window", [None, 0])
def test_a_batch_has_the_samples_that_there_are(views: Path, window: int | None) -> None:
    """Of five views each, all pairs, or, where the window is 0, every view twice: within a level or two."""
    samples = open_samples(views, window)
    batch = samples.batch(range(20), CPU)
    singly = [samples[number] for number in range(100)]
    expected = default_collate(singly)
    assert {name: (value.shape[1:], value.dtype) for name, value in batch.items()} == {
        name: (value.shape[1:], value.dtype) for name, value in expected.items()
    }
    nearest = []
    for reference, picture in zip(batch["reference"], batch["picture"], strict=True):
        off = (expected["reference"] - reference).abs().amax((1, 2, 3)) * 255
        off = torch.maximum(off, (expected["picture"] - picture).abs().amax((1, 2, 3)) * 127.5)
        assert off.min() < 2.01
        nearest.append(int(off.argmin()))
    np.testing.assert_allclose(batch["places"], expected["places"][nearest], atol=0.5)
    assert len({singly[index]["picture"].tobytes() for index in nearest}) > 3


def test_a_reference_that_is_dropped_shows_no_places(views: Path) -> None:
    batch = open_samples(views, drop=0.5).batch(range(40), CPU)
    dropped = batch["dropped"] == 1
    assert 8 < dropped.sum() < 32
    assert batch["places"][dropped].isnan().all()
    assert batch["places"][~dropped].isfinite().any()

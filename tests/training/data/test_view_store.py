"""A store of views holds what the renderer draws, object by object, and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from training.data.synthetic.views import View, reference_view, scene_view
from training.data.view_store import REFERENCES, SCENES, ViewStore, draw_views, main


def assert_equal(one: View, other: View) -> None:
    """Both have the same pixels, and the same mask."""
    assert np.array_equal(one.image, other.image)
    assert np.array_equal(one.mask, other.mask)


def test_rows_are_the_views_of_objects(tmp_path: Path) -> None:
    draw_views(tmp_path, count=2)
    store = ViewStore(tmp_path)
    for number in range(SCENES):
        assert_equal(store.scene(1, number), scene_view(1, number))
    for number in range(REFERENCES):
        assert_equal(store.reference(1, number), reference_view(1, number))


def test_drawing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    draw_views(tmp_path, count=2)
    store = ViewStore(tmp_path)
    drawn = store.scenes.copy()
    arrays = np.lib.format.open_memmap(tmp_path / "scenes.npy", mode="r+")
    arrays[:] = 0
    arrays.flush()
    (tmp_path / "done.txt").write_text("1")
    draw_views(tmp_path, count=2)
    assert len(ViewStore(tmp_path)) == 2
    assert not arrays[0].any()
    assert np.array_equal(arrays[1], drawn[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "views"), "--device", "cuda"])
    assert "PyTorch sees no card on this machine" in capsys.readouterr().err
    assert not (tmp_path / "views").exists()

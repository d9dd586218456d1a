"""How well the main object is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.segmentation import before_one_colour, found, in_a_room, main, overlap
from runtime import Segmenter
from runtime.imaging.masks import MASK_THRESHOLD


def test_overlap() -> None:
    mask, truth = np.zeros((2, 4, 4), bool)
    mask[:2], truth[1:3] = True, True
    assert overlap(mask, truth) == pytest.approx(1 / 3)
    assert overlap(np.zeros_like(mask), truth) == 0


def test_the_rule_finds_what_is_before_one_colour() -> None:
    view = before_one_colour(0)
    assert overlap(found(Segmenter(), view), view.mask > MASK_THRESHOLD) > 0.9
    assert not found(Segmenter(), in_a_room(0)).any()


def test_the_table(
    segmenter_bundles: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a network that takes bright things for the main object."""
    output = tmp_path / "segmentation.json"
    assert main([str(segmenter_bundles[0]), "--count", "2", "--output", str(output)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[1:3]] == [["u2net", "room"], ["u2net", "backdrop"]]
    rows = json.loads(output.read_text("utf-8"))["rows"]
    assert len(rows) == 4
    assert rows[0]["overlap"] < 0.9 < rows[3]["overlap"]
    assert Image.open(output.with_suffix(".png")).size[0] > 4 * 128
    assert main([str(tmp_path / "none"), "--output", str(output)]) == 2

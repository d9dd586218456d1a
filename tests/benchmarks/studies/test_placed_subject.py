"""A subject that a server places by prompt: a share per prompt, and the scene elsewhere as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.studies.placed_subject import Place, main
from runtime import Sampling
from runtime.imaging.boxes import Box
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle
from tests.training.systems.test_dreambooth import save_pictures

pytestmark = pytest.mark.nightly


def test_a_share_for_the_subject_and_for_its_class(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    for name in ("0-cat", "1-mat"):
        save_pictures(tmp_path / "objects" / name, (40, 40))
    scene = np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8)
    Image.fromarray(scene).save(tmp_path / "scene.png")
    output = tmp_path / "placed.json"
    bundle = [str(tiny_stable_diffusion_bundle(9, version="1.x")), "--objects", str(tmp_path / "objects")]
    where = ["--scene", str(tmp_path / "scene.png"), "--box", "20,20,60,60", "--identifier", "mat"]
    assert main([*bundle, *where, "--steps", "1", "--count", "2", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["prompt"] for row in rows] == ["a mat cat", "a cat"]
    assert all(0 <= row["recognised"] <= 1 for row in rows)
    assert Image.open(output.with_suffix(".png")).size == (2 * 96, 2 * 80)


def test_what_the_model_sees_is_around_the_box() -> None:
    scene = np.zeros((80, 96, 3), np.uint8)
    rows, columns = Place(scene, Box(20, 30, 60, 70), 1.5, Sampling()).seen
    assert (rows.start, rows.stop, columns.start, columns.stop) == (20, 80, 10, 70)


def test_objects_that_are_not_there_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bundle", "--objects", str(tmp_path), "--output", str(tmp_path / "placed.json")]
    assert main(arguments) == 2
    assert "has 0 folders of pictures" in capsys.readouterr().err

"""The sheet of pairs, and whether data are made as fast as they are taken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny import TINY
from training.data import view_store
from training.data.encoded import rows_done
from training.data.pairs import PairRules
from training.data.view_pairs import ViewPairs
from training.data.view_store import ViewStore, draw_views
from training.inspect_data import feed_rate, main, rate
from training.loop_settings import LoopSettings
from training.network.modules import AnyDoor
from training.small.encoding import encode_pairs

RECIPE = """
[architecture]
unet_channels = [32, 64]
unet_attention = [false, true]
unet_layers = 1
unet_head_width = 32
token_width = 32
vae_channels = [32, 32, 32, 32]
vae_layers = 1
dino_width = 64
dino_depth = 1
dino_heads = 1
dino_grid = 16

[pairs]
resolution = 32

[diffusion]
steps = 1
batch = 2
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rendered objects, and a recipe."""
    folder = tmp_path_factory.mktemp("run")
    draw_views(folder / "views", count=2)
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


def test_a_rate_counts_what_follows_the_first_time(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []
    assert rate(lambda: calls.append(1), samples=5, seconds=0.0, what="calls") > 0
    assert len(calls) == 3
    assert "measuring calls" in capsys.readouterr().err


def test_what_is_fed_is_what_the_loop_would_read() -> None:
    read: list[int] = []

    class Counting:
        def __getitem__(self, number: int) -> dict[str, Any]:
            read.append(number)
            return {"x": np.zeros(2, np.float32)}

    assert feed_rate(Counting(), LoopSettings(steps=1, batch=4), seconds=0.0, what="data") > 0
    assert read == list(range(12))


def test_rendered_pairs_are_drawn_and_timed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet, recipe = run / "pairs.png", str(run / "tiny.toml")
    arguments = [recipe, str(sheet), "--folder", str(run), "--count", "3", "--seconds", "0.01"]
    assert main(arguments) == 2
    assert "there are no encoded pairs" in capsys.readouterr().err

    torch.manual_seed(0)
    rules = PairRules(resolution=32)
    pairs = ViewPairs(ViewStore(run / "views"), rules, single=0.5)
    encode_pairs(AnyDoor(TINY).eval(), pairs, run / "pairs", count=4, batch=3, workers=1)
    assert rows_done(run / "pairs") == 4
    before = {path.name: path.read_bytes() for path in (run / "pairs").iterdir()}
    assert main(arguments) == 0
    # 32 px each: reference, collage, mask and picture
    assert Image.open(sheet).size == (3 * 32, 4 * 32)
    printed = capsys.readouterr()
    assert "drawing pairs" in printed.err
    sheet_line, *lines = printed.out.splitlines()
    assert sheet_line == f"the sheet: {sheet}"
    found = [re.search(r"^(.*): ([\d.]+) samples per second with", line) for line in lines]
    rates = {line[1]: float(line[2]) for line in found if line}
    made, read = "making pairs of stored views, once before", "reading encoded pairs while training"
    assert list(rates) == ["the loop", made, read]
    for line in lines[1:]:
        times = re.search(r": ([\d.]+) .* ([\d.]+) times the loop$", line)
        assert times
        # all three are rounded to a tenth
        fed, taken, half = float(times[1]), rates["the loop"], 0.0501
        assert (fed - half) / (taken + half) - half <= float(times[2]) <= (fed + half) / (taken - half) + half
    assert {path.name: path.read_bytes() for path in (run / "pairs").iterdir()} == before


def test_a_folder_without_views_is_told(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run / "tiny.toml"), str(tmp_path / "x.png"), "--folder", str(tmp_path)]) == 2
    assert f"no views in {tmp_path / 'views'}: draw some with" in capsys.readouterr().err


def test_a_recipe_alone_is_enough(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(run)
    assert main([str(run / "tiny.toml"), "--seconds", "0"]) == 0
    assert capsys.readouterr().out == "the sheet: build/pairs.png\n"
    assert Image.open(tmp_path / "build/pairs.png").size == (12 * 32, 4 * 32)


def test_pairs_of_data_sets_are_timed_as_they_are_made(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data/Imgs").mkdir(parents=True)
    for name, size in (("one.jpg", 0), ("one.png", 255)):
        canvas = np.zeros((40, 40), np.uint8)
        canvas[10:30, 12:28] = size
        Image.fromarray(canvas).save(tmp_path / "data/Imgs" / name)
    source = f'\n[[sources]]\nname = "MSRA10K"\nroot = "{tmp_path / "data"}"\n'
    (tmp_path / "sets.toml").write_text((run / "tiny.toml").read_text() + source)
    arguments = [str(tmp_path / "sets.toml"), str(tmp_path / "new/sheet.png"), "--seconds", "0.01"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "making pairs while training: " in printed
    assert "encoded" not in printed


def test_pairs_that_are_drawn_while_it_trains_are_timed(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "drawn.toml").write_text((run / "tiny.toml").read_text() + "\n[data]\npairs = 0\n")
    arguments = [str(tmp_path / "drawn.toml"), str(tmp_path / "sheet.png"), "--folder", str(tmp_path)]
    assert main([*arguments, "--count", "2", "--seconds", "0.01"]) == 0
    assert Image.open(tmp_path / "sheet.png").size == (2 * 32, 4 * 32)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == ["the loop", "pairs drawn while training"]


def test_views_that_are_there_already_are_not_drawn_for_another_number(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert view_store.main([str(run / "views"), "--objects", "5"]) == 2
    assert "expected (5, 3, 160, 160, 4): give another folder" in capsys.readouterr().err

"""Where attention looks, against looks whose place and spread are known; and what the command refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.studies.attention_places import main, squares


def looking_at(row: int, column: int) -> torch.Tensor:
    """All attention on one of 16 x 16 tokens."""
    looks = torch.zeros(16, 16)
    looks[row, column] = 1
    return looks.flatten()


def test_offset_and_spread_are_in_tokens() -> None:
    places = torch.full((2, 2, 2), math.nan)
    places[0, 1] = torch.tensor([4.5, 9.5])  # the middle of the token in row 4, column 9
    here, below, right = looking_at(4, 9), looking_at(7, 9), looking_at(4, 13)
    elsewhere = looking_at(0, 0)
    offset, spread = squares(torch.stack([elsewhere, here, elsewhere, elsewhere])[None], places)
    assert (offset.tolist(), spread.tolist()) == ([0], [0])
    # one head three tokens below, one four to the right: both apart, sharp each
    heads = torch.stack([torch.stack([elsewhere, head, elsewhere, elsewhere]) for head in (below, right)])
    offset, spread = squares(heads, places)
    assert (offset.tolist(), spread.tolist()) == ([1.5**2 + 2**2], [0])
    # one head that looks at both
    both = torch.stack([elsewhere, (below + right) / 2, elsewhere, elsewhere])[None]
    offset, spread = squares(both, places)
    assert (offset.tolist(), spread.tolist()) == ([1.5**2 + 2**2], [1.5**2 + 2**2])


def test_cells_of_coarser_levels_take_the_mean_place() -> None:
    places = 2.0 * torch.cartesian_prod(torch.arange(4), torch.arange(4)).view(4, 4, 2) + 1
    looks = torch.stack([looking_at(r, c) for r in (1, 5) for c in (1, 5)])[None]
    offset, _ = squares(looks, places)  # the middles are at 2 and 6, those of the tokens at 1.5 and 5.5
    assert offset.tolist() == [0.5] * 4


def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "places.json"
    assert main(["--count", "1", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    layers = {row["layer"]: row for row in results["rows"]}
    assert any(name.startswith("control.down_blocks.0") for name in layers)
    assert any(name.startswith("unet.up_blocks.2") for name in layers)
    assert all(0 < row["offset"] < 16 and 0 < row["spread"] < 16 for row in layers.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in layers)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--count", "0"], "--count is at least 1"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors"),
        (["--checkpoint", "examples/imprint-small.safetensors.index.json"], "is not an AnyDoor checkpoint"),
    ],
)
def test_refusals(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    example_checkpoint: Path,
    arguments: list[str],
    reason: str,
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "out.json")]) == 2
    assert reason in capsys.readouterr().err

"""The study of rewritten graphs, on the smallest network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies.graph_rewrites import main


def test_a_bundle_gains_nothing_on_itself(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    bundles = [str(tiny_bundle)] * 2
    rest = ["--graphs", "control", "--backends", "onnxruntime", "--calls", "2", "--rounds", "1"]
    assert main([*bundles, *rest, "--results", str(path)]) == 0
    [row] = json.loads(path.read_text())["rows"]
    assert set(row["error"].values()) == {0.0}
    assert [len(calls["seconds"]) for calls in row["before"] + row["after"]] == [2, 2]
    assert "| control | onnxruntime, fp32 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give two bundles"),
        (["one", "two", "--calls", "1"], "--calls must be at least 2"),
        (["no bundle", "no bundle", "--rounds", "1"], "no bundle"),
    ],
)
def test_refusals(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--results", str(tmp_path / "results.json")]) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]

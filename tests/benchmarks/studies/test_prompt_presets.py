"""Presets on prompts: a row per setting, against the exact picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies.prompt_presets import EXACT, OTHER_SEED, SETTINGS, main
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

pytestmark = pytest.mark.nightly


def test_a_row_per_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    output = tmp_path / "presets.json"
    arguments = [str(tiny_stable_diffusion_bundle()), "--prompts", str(tmp_path / "prompts.txt")]
    status = main([*arguments, "--seeds", "1", "--output", str(output), "--threads", "1"])
    rows = {row["setting"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows.keys() == SETTINGS.keys()
    assert rows[EXACT]["change"] == 0
    assert rows[OTHER_SEED]["change"] == pytest.approx(1)
    assert rows["ddim 20"]["change"] > 0
    assert status == ("OUT" in capsys.readouterr().out)


def test_a_file_without_prompts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    arguments = [str(tiny_stable_diffusion_bundle()), "--prompts", str(tmp_path / "empty.txt")]
    assert main([*arguments, "--output", str(tmp_path / "presets.json")]) == 2
    assert "has a line at least" in capsys.readouterr().err

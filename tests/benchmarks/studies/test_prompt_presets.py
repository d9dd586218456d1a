"""Presets on prompts: a row per setting, against the exact picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies.prompt_presets import EXACT, OTHER_SEED, SETTINGS, main, verdict
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle
from tests.training.systems.test_dreambooth import save_pictures

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


def test_a_subject_is_recognised_and_its_likeness_has_a_limit(tmp_path: Path) -> None:
    """Its prompts name its class; what another seed draws is the unit of the loss."""
    (tmp_path / "prompts.txt").write_text("a {}\n")
    (tmp_path / "objects").mkdir()
    for name in ("0-cat", "1-mat"):
        save_pictures(tmp_path / "objects" / name, (40, 40))
    output = tmp_path / "presets.json"
    arguments = [str(tiny_stable_diffusion_bundle()), "--prompts", str(tmp_path / "prompts.txt")]
    objects = ["--objects", str(tmp_path / "objects"), "--seeds", "1"]
    main([*arguments, *objects, "--output", str(output), "--threads", "1"])
    rows = {row["setting"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows[EXACT]["loss"] == 0
    assert abs(rows[OTHER_SEED]["loss"]) == pytest.approx(1)
    assert all(0 <= row["recognised"] <= 1 for row in rows.values())


@pytest.mark.parametrize(("loss", "kept"), [(0.5, True), (0.6, False)])
def test_a_preset_that_loses_the_subject_is_out(loss: float, kept: bool) -> None:
    row = {"setting": "balanced", "speed_up": 2.5, "change": 0.1, "loss": loss}
    assert verdict(row).startswith("ok" if kept else "OUT")


def test_a_file_without_prompts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    arguments = [str(tiny_stable_diffusion_bundle()), "--prompts", str(tmp_path / "empty.txt")]
    assert main([*arguments, "--output", str(tmp_path / "presets.json")]) == 2
    assert "has a line at least" in capsys.readouterr().err

"""The tool that measures what speed costs: on the smallest network, and its arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed_vs_quality import main
from benchmarks.support.speed_vs_quality_report import LIMITS, table, verdicts
from benchmarks.support.trials import EXACT, OTHER_SEED, RowCounter, Trial, settings, summarise
from runtime import Sampling
from runtime.diffusion.presets import QUALITIES
from runtime.systems import imprint
from runtime.systems.anydoor import DEFAULTS
from tests.support.anydoor import CONTROL, DECODE, DENOISE

EXACTLY = Trial(8.0, 8.0, 100, 100, 0.80, 20.0, True, 0.0)
OTHERWISE = replace(EXACTLY, ssim=0.76, change=10.0)
TODO = [s for s in settings(2.0, DEFAULTS) if s.name in (EXACT, OTHER_SEED, *LIMITS)]


def rows_with(balanced: Trial, fast: Trial):  # type: ignore[no-untyped-def]
    return summarise(TODO, [[EXACTLY, OTHERWISE, balanced, fast]] * 2)


def test_every_quality_is_measured_with_the_same_guidance() -> None:
    todo = settings(3.5, DEFAULTS)
    assert {setting.sampling.guidance_scale for setting in todo} == {3.5}
    assert QUALITIES.keys() <= {setting.name for setting in todo}
    assert todo[0].name == EXACT
    assert len({setting.name for setting in todo}) == len(todo)


def test_a_model_without_detail_maps_is_measured_without_them() -> None:
    todo = {setting.name: setting.sampling for setting in settings(None, imprint.DEFAULTS)}
    assert all(sampling.map_steps is None for sampling in todo.values())
    assert todo["balanced"] == Sampling(quality=EXACT, sampler="dpm_solver_2m", steps=20)
    assert todo["fast"].guidance_interval == (200, 999)


def test_loss_and_change_are_parts_of_what_another_seed_does() -> None:
    own = replace(EXACTLY, seconds=2.0, ssim=0.79, change=5.0)
    row = rows_with(own, own)[2]
    assert row.speed_up == 4.0
    assert row.change == pytest.approx(0.5)
    assert row.loss == pytest.approx(0.01 / 0.04)
    assert row.ssim_loss == pytest.approx(0.01)
    assert row.recognised == 1.0


def test_rows_are_counted_also_where_an_engine_takes_several_steps_at_once() -> None:
    counter = RowCounter()
    one_step, three_steps = np.zeros(4, np.int32), np.zeros((3, 4), np.int32)
    for action, graph, inputs in (
        ("load", DENOISE, {}),
        ("run", DENOISE, {"row_sample": one_step}),
        ("run", DENOISE, {"row_sample": three_steps}),
        ("run", CONTROL, {"timestep": np.zeros(2, np.float32)}),
        ("run", DECODE, {"latent": np.zeros(1)}),
    ):
        with counter(action, graph, inputs):
            pass
    assert counter.rows == {CONTROL: 2, DENOISE: 4 + 12}
    counter.reset()
    assert counter.rows == {CONTROL: 0, DENOISE: 0}


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        (replace(EXACTLY, seconds=1.9, ssim=0.795, change=2.0), True),
        (replace(EXACTLY, seconds=1.9, ssim=0.95, change=2.0), True),
        (replace(EXACTLY, seconds=4.1, ssim=0.795, change=2.0), False),
        (replace(EXACTLY, seconds=1.9, ssim=0.775, change=2.0), False),
        (replace(EXACTLY, seconds=1.9, ssim=0.795, change=3.0), False),
    ],
)
def test_a_preset_has_to_keep_all_its_limits(own: Trial, kept: bool) -> None:
    fine = replace(EXACTLY, seconds=1.0)
    (sentence, found), (_, other) = verdicts(rows_with(own, fine))
    assert (found, other) == (kept, True)
    assert sentence.startswith("balanced: ")
    assert sentence.endswith("ok" if kept else "OUT")


@pytest.mark.slow
def test_the_command_on_the_smallest_network(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "speed_vs_quality"
    options = ["--count", "1", "--among", "0", "--backend", "onnxruntime", "--quiet"]
    # whether the presets keep their limits is nothing that an untrained network on a busy machine can tell
    assert main(["--bundle", str(tiny_bundle), "--output", str(output), *options]) in (0, 1)
    content = json.loads(output.with_suffix(".json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert (rows[EXACT]["unet_rows"], rows[EXACT]["control_rows"]) == (100, 100)
    assert (rows[EXACT]["speed_up"], rows[EXACT]["change"], rows[EXACT]["loss"]) == (1, 0, 0)
    assert rows["maps 10"]["control_rows"] == 20
    assert rows["ddim 25"]["unet_rows"] == 50
    assert rows[OTHER_SEED]["change"] == 1
    assert output.with_suffix(".png").stat().st_size > 0
    assert "balanced: " in capsys.readouterr().out


def test_table_has_a_line_per_setting() -> None:
    text = table(rows_with(EXACTLY, EXACTLY))
    assert [line.split("  ")[0] for line in text.splitlines()[2:]] == [setting.name for setting in TODO]


@pytest.mark.parametrize("options", [["--count", "0"], ["--among", "1"], ["--bundle", "none"]])
def test_what_cannot_be_used(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*options, "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("speed_vs_quality.py: ")

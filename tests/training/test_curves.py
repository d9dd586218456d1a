"""The table of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.curves import Curves


def test_columns_of_the_table_mean_what_its_header_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a run goes on with other losses; its seconds go on, too."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def rows(start: int, *steps: int, **losses: float) -> None:
        nonlocal now
        run = Curves(tmp_path, start, samples_per_step=1, write=True)
        run.add({name: torch.tensor(value) for name, value in losses.items()})
        for step in steps:
            now += 100
            run.row(step)
        run.close()

    rows(0, 1, 2, loss=0.5, noise=0.25)
    rows(1, 3, loss=0.5, guide=4.0, noise=0.125)  # killed after step 2 was written, before its checkpoint was
    expected = ["step,seconds,loss,noise,guide", "1,100,0.50000,0.25000,", "3,200,0.50000,0.12500,4.00000"]
    assert (tmp_path / "log.csv").read_text().splitlines() == expected


def test_a_table_that_an_earlier_version_mixed_up_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,seconds,loss\n10,7,0.5\n20,3,0.4,0.3\n")
    run = Curves(tmp_path, 20, samples_per_step=1, write=True)
    run.add({"loss": torch.tensor(0.25)})
    run.row(30)
    run.close()
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[:3] == ["step,seconds,loss", "10,7,0.5", "20,3,0.4"]
    assert lines[3].startswith("30,")

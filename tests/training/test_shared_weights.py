"""Checkpoints that share weights are stored once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.network.checkpoint import write_tensors
from training.network.checkpoint_file import read_tensors
from training.shared_weights import main

SHARED, OWN = torch.arange(12.0).reshape(3, 4), torch.ones(2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    write_tensors(tmp_path / "models/theirs.safetensors", {"vae": SHARED, "unet": OWN}, {"made": "theirs"})
    weights = {"vae": SHARED, "unet": 2 * OWN, "half": OWN.half(), "more": OWN}
    write_tensors(tmp_path / "model.safetensors", weights, {"made": "model"})
    return tmp_path


def test_what_the_other_has_is_left_out_and_nothing_is_lost(folder: Path) -> None:
    base, output = folder / "models/theirs.safetensors", folder / "models/small"
    assert main([str(folder / "model.safetensors"), str(base), "--output", str(output)]) == 0
    assert set(read_tensors(folder / "models/small.weights.safetensors").shapes) == {"unet", "half", "more"}
    found = read_tensors(folder / "models/small.safetensors.index.json")
    expected = read_tensors(folder / "model.safetensors")
    assert found.metadata["made"] == "model"
    assert found.shapes == expected.shapes
    for name in expected.shapes:
        assert found.tensors[name].dtype == expected.tensors[name].dtype
        assert torch.equal(found.tensors[name], expected.tensors[name])


def test_another_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder / "model.safetensors"), str(folder / "models/theirs.safetensors")]
    assert main([*arguments, "--output", str(folder / "small")]) == 2
    assert "an index names files beside it" in capsys.readouterr().err

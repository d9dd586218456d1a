"""The build command: what cannot be built is refused in one sentence and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.seeded import TINY
from engines.bundle import Bundle, sha256
from export.build_engines import main
from export.verification import TOLERANCE
from training.network.checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *arguments: object) -> str:
    """The one line that a failing build prints."""
    assert main([str(argument) for argument in arguments] + ["--quiet"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_manifest_holds_source_hash_and_measured_errors(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.checkpoint == {"file": tiny_checkpoint.name, "sha256": sha256(tiny_checkpoint)}
    for graph, record in manifest.graphs.items():
        assert set(record.error) == {tensor.name for tensor in manifest.specs[graph].outputs}
        # an error of exactly zero would mean that nothing was compared; pictures in 256 levels may agree
        assert all(0 < error < TOLERANCE["fp32"] for name, error in record.error.items() if name != "image")
        assert record.build_seconds > 0


def test_bundle_tells_nothing_of_the_machine_that_built_it(tiny_bundle: Path) -> None:
    """Exporters note Python stack traces on every node; they name the builder's files."""
    for path in tiny_bundle.glob("*.onnx"):
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert b".py" not in content


def test_weight_that_is_not_a_number(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    tensors = load_file(tiny_checkpoint)
    tensors["cond_stage_model.model.blocks.0.mlp.w3.bias"][3] = float("nan")
    write_checkpoint(tmp_path / "nan.safetensors", tensors, TINY)
    line = refused(capsys, tmp_path / "nan.safetensors", "--output", tmp_path / "bundle", "--resolution", 64)
    assert "not finite numbers (NaN or infinity): 'cond_stage_model.model.blocks.0.mlp.w3.bias'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["nan.safetensors"]


def test_wrong_key_set(tmp_path: Path, capsys: Capture) -> None:
    write_checkpoint(tmp_path / "other.safetensors", {"lora.up": torch.zeros(3)}, TINY)
    line = refused(capsys, tmp_path / "other.safetensors", "--output", tmp_path / "bundle")
    assert "is not an AnyDoor checkpoint: it has no model.diffusion_model.*" in line
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--resolution", 100, "--resolution must be a multiple of 16"),
        ("--resolution", 0, "--resolution must be a multiple of 16"),
        ("--max-batch", 0, "--max-batch must be at least 1"),
    ],
)
def test_options_that_cannot_be_built(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Capture, option: str, value: int, sentence: str
) -> None:
    assert sentence in refused(capsys, tiny_checkpoint, "--output", tmp_path / "bundle", option, value)
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_directories_are_not_replaced(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    assert "with other things in it" in refused(capsys, tiny_checkpoint, "--output", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


def test_checkpoint_is_described_before_work_begins(tiny_checkpoint: Path, capsys: Capture) -> None:
    main([str(tiny_checkpoint), "--resolution", "100"])
    assert capsys.readouterr().out == (
        "checkpoint: AnyDoor, 2 million weights, float32: UNet predicts the noise; ID encoder DINOv2 of 1 "
        "layers, 32 wide\n"
    )


def test_runs_as_a_script(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "export" / "build_engines.py"), str(tmp_path / "none.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert (
        result.stderr.strip() == f"build_engines.py: there is no checkpoint at '{tmp_path}/none.safetensors'"
    )

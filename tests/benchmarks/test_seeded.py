"""Checkpoints with seeded weights: what the command writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.seeded import main

Capture = pytest.CaptureFixture[str]


def test_the_command_writes_the_checkpoint_of_its_seed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert main(["tiny", seed, str(tmp_path / seed)]) == 0
    expected, same, other = (load_file(path) for path in (tiny_checkpoint, tmp_path / "0", tmp_path / "1"))
    assert same.keys() == other.keys() == expected.keys()
    assert all(torch.equal(same[key], tensor) for key, tensor in expected.items())
    key = "model.diffusion_model.out.2.weight"
    assert not torch.equal(other[key], expected[key])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["full", "x", "out"], "argument SEED: invalid int value: 'x'"),
        (["huge", "0", "out"], "invalid choice: 'huge'"),
        (["tiny", "0"], "required: FILE.safetensors"),
        (["tiny", "0", "file/out"], "cannot write 'file/out'"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    try:
        code: object = main(arguments)
    except SystemExit as exit_:  # argparse leaves this way
        code = exit_.code
    assert code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("seeded.py: ")
    assert sentence in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

"""Checkpoints with seeded weights: what the command writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import load_file

from benchmarks.seeded import ARCHITECTURES, main, seeded_tensor
from training.network.stable_diffusion_checkpoint import read_stable_diffusion

Capture = pytest.CaptureFixture[str]


def test_the_command_writes_the_checkpoint_of_its_seed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert main(["tiny", seed, str(tmp_path / seed)]) == 0
    expected, same, other = (load_file(path) for path in (tiny_checkpoint, tmp_path / "0", tmp_path / "1"))
    assert same.keys() == other.keys() == expected.keys()
    assert all(torch.equal(same[key], tensor) for key, tensor in expected.items())
    key = "model.diffusion_model.out.2.weight"
    assert not torch.equal(other[key], expected[key])


def test_stable_diffusion_becomes_a_folder_that_diffusers_opens(tmp_path: Path) -> None:
    assert main(["stable-diffusion-small", "0", str(tmp_path / "new" / "small")]) == 0
    checkpoint = read_stable_diffusion(tmp_path / "new" / "small")
    assert checkpoint.architecture == ARCHITECTURES["stable-diffusion-small"]
    key = "model.diffusion_model.out.2.weight"
    weight = checkpoint.parts["unet"]["conv_out.weight"]
    np.testing.assert_array_equal(weight, seeded_tensor(key, tuple(weight.shape), 0))
    pipe = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "new" / "small")
    assert checkpoint.tokenizer is not None
    theirs = pipe.tokenizer("a red cup", padding="max_length", max_length=77)["input_ids"]
    assert checkpoint.tokenizer.open().encode("a red cup") == theirs


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

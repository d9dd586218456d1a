"""Small models side by side in the minutes that a card is there: rehearsed on the processor."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.training import test_train, test_train_imprint
from tests.training.test_train import refusal
from training import train_card
from training.clock import TimeLimit
from training.network.checkpoint import read_checkpoint
from training.train_card import PACKED_BYTES, SECONDS_TO_PACK, Run, main, pack, wait_for


@pytest.mark.slow
def test_recipes_share_their_objects_and_what_they_learn_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of the program that runs the tests the minutes are over
    monkeypatch.setattr(train_card, "program_start", time.monotonic)
    sections = {name: {"minutes": 1.0} for name in ("autoencoder", "identity", "views", "compositing")}
    sections["defaults"] = {"steps": 2}  # of the pictures that it shows
    whole = test_train_imprint.write_recipe(tmp_path / "whole.toml", **sections)
    part = test_train.write_recipe(tmp_path / "part.toml", data={"objects": 2}, autoencoder={"minutes": 1.0})
    where = ["--folder", str(tmp_path / "run"), "--output", str(tmp_path / "packed")]
    assert main([str(whole), f"{part}:autoencoder", "--minutes", "10", *where]) == 0
    assert [path.parent for path in tmp_path.rglob("scenes.npy")] == [tmp_path / "run/objects"]
    packed = tmp_path / "packed"
    assert {path.name for path in packed.iterdir()} == {
        "whole-model.safetensors",
        "whole-train.log",
        *(f"whole-{stage}-log.csv" for stage in test_train_imprint.TRAINED),
        "part-autoencoder-mean.pt",
        "part-autoencoder-log.csv",
        "part-train.log",
    }
    assert read_checkpoint(packed / "whole-model.safetensors").system == "imprint"
    assert torch.load(packed / "part-autoencoder-mean.pt", weights_only=True)


def test_changes_of_a_recipe_go_on_to_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(train_card.subprocess, "Popen", lambda command, **_: commands.append(command))
    run = Run.of(f"{test_train.write_recipe(tmp_path / 'part.toml')}:diffusion", ["data.pairs=0"])
    assert run.recipe.data.pairs == 0  # type: ignore[union-attr]
    run.start(tmp_path, 1.0)
    (command,) = commands
    assert command[command.index("--stage") + 1] == "diffusion"
    assert command[command.index("--set") + 1] == "data.pairs=0"


def test_a_run_that_does_not_end_in_its_time_is_ended(tmp_path: Path) -> None:
    began = time.monotonic() - 100 - SECONDS_TO_PACK
    hanging, done = (subprocess.Popen(command) for command in (["sleep", "600"], ["true"]))
    done.wait()
    failed = wait_for({"hanging": hanging, "done": done}, tmp_path, TimeLimit(100, began))
    assert failed == ["hanging"]
    assert hanging.returncode == -signal.SIGKILL


def test_large_files_are_cut(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "packed"
    run.mkdir()
    output.mkdir()
    content = bytes(range(256)) * (PACKED_BYTES // 256) + b"the end"
    (run / "model.safetensors").write_bytes(content)
    parts = pack(run, output)
    assert [path.name for path in parts] == [f"run-model.safetensors.part00{n}" for n in (0, 1)]
    assert b"".join(path.read_bytes() for path in parts) == content
    (run / "model.safetensors").write_bytes(b"a smaller one")
    (packed,) = pack(run, output)
    assert list(output.iterdir()) == [packed]  # without the parts of the larger one


def test_weights_that_the_checkpoint_does_not_have_yet_are_packed(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "packed"
    output.mkdir()
    for number, name in enumerate(("autoencoder/mean.pt", "model.safetensors", "diffusion/mean.pt")):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
        os.utime(run / name, (number, number))
    assert [path.name for path in pack(run, output)] == ["run-autoencoder-mean.pt", "run-diffusion-mean.pt"]
    os.utime(run / "model.safetensors", (3, 3))
    assert [path.name for path in pack(run, output)] == ["run-model.safetensors"]
    assert [path.name for path in output.iterdir()] == ["run-model.safetensors"]  # without the averages


def test_a_checkpoint_in_a_folder_is_one_file(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "packed"
    (run / "model/unet").mkdir(parents=True)
    output.mkdir()
    (run / "model/unet/config.json").write_text("{}")
    (archive,) = pack(run, output)
    shutil.unpack_archive(archive, tmp_path / "there")
    assert (tmp_path / "there/unet/config.json").read_text() == "{}"


def test_what_cannot_be_trained_is_told_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_card, "draw_views", lambda *_: pytest.fail("objects were drawn"))
    one, other = (
        test_train_imprint.write_recipe(
            tmp_path / f"{number}.toml", data={"objects": number}, autoencoder={"minutes": 1.0}
        )
        for number in (2, 3)
    )

    def told(*arguments: object) -> str:
        return refusal(capsys, *arguments, "--output", tmp_path, command=main)

    with monkeypatch.context() as patch:
        patch.setattr(train_card, "FIRST_VERSIONS", {"transformers": (99, 1)})
        assert "is too old, it must be 99.1 or later" in told(one, "--minutes", 1)
    with monkeypatch.context() as patch:
        patch.setattr(train_card, "FIRST_VERSIONS", {"no-such-library": (1, 0)})
        assert "no-such-library is not installed: pip install '.[train]'" in told(one, "--minutes", 1)
    assert "writing and packing alone take 10 s" in told(one, "--minutes", 0.1)
    assert "nothing.toml" in told(tmp_path / "nothing.toml", "--minutes", 1)
    assert "want [2, 3] of them" in told(one, other, "--minutes", 1)
    elsewhere = test_train_imprint.write_recipe(
        tmp_path / "elsewhere.toml",
        data={"objects": 2, "objects_folder": "elsewhere"},
        autoencoder={"minutes": 1.0},
    )
    assert "have other folders for them: ['', 'elsewhere']" in told(one, elsewhere, "--minutes", 1)

"""Runs whose files are damaged, of another recipe or without room, and runs that are stopped."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from engines.files import only_writer, partial_path
from tests.training.test_train import refusal, write_recipe
from training import train as command
from training import train_card
from training.data import arrays, view_store
from training.data.arrays import ArrayError, make_array, mapped_array, read_count
from training.data.view_store import SCENES, StoreError, ViewStore
from training.systems.identity import IdentityTask
from training.train_state import save_atomically

Capture = pytest.CaptureFixture[str]

NOISE = bytes(range(256))
FILES = {"text": b"hello", "empty": b"", "noise": NOISE}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder of a run whose objects are drawn: noise."""
    views = tmp_path / "views"
    rng = np.random.default_rng(0)
    for name, count in (("scenes", SCENES), ("references", view_store.REFERENCES)):
        array = make_array(views / f"{name}.npy", np.uint8, (3, count, 160, 160, 4))
        array[:] = rng.integers(0, 256, array.shape, np.uint8)
    (views / "done.txt").write_text("3")
    write_recipe(tmp_path / "tiny.toml")
    return tmp_path


def told(capsys: Capture, run: Path, stage: str, *changes: str) -> str:
    flags = [part for change in changes for part in ("--set", change)]
    return refusal(capsys, run / "tiny.toml", "--folder", run, "--stage", stage, *flags)


def train_autoencoder(run: Path) -> None:
    assert command.main([str(run / "tiny.toml"), "--folder", str(run), "--stage", "autoencoder"]) == 0


# --- damaged files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_damaged_state_is_told(run: Path, capsys: Capture, content: bytes) -> None:
    stage = run / "autoencoder"
    stage.mkdir()
    (stage / "last.pt").write_bytes(content)
    sentence = f"'{stage}/last.pt' is damaged: delete '{stage}' to run the stage 'autoencoder' anew"
    assert told(capsys, run, "autoencoder") == f"train: {sentence}"
    (stage / "mean.pt").write_bytes(content)
    assert f"'{stage}/mean.pt' is damaged" in told(capsys, run, "decoder")


def test_half_of_a_state_and_a_state_of_something_else_are_told(run: Path, capsys: Capture) -> None:
    train_autoencoder(run)
    state = run / "autoencoder" / "last.pt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    assert "is damaged" in told(capsys, run, "autoencoder")
    save_atomically([1], state)
    assert "is damaged" in told(capsys, run, "autoencoder")
    save_atomically({"step": 1}, state)
    assert "does not fit what the recipe describes" in told(capsys, run, "autoencoder")


def test_two_trainings_do_not_write_into_one_folder(run: Path, capsys: Capture) -> None:
    with only_writer(run / "autoencoder"):
        sentence = told(capsys, run, "autoencoder")
    assert f"process {os.getpid()} is writing there: '{run / 'autoencoder'}'" in sentence
    train_autoencoder(run)


def test_one_process_draws_into_a_folder(run: Path, capsys: Capture) -> None:
    """When all is drawn, many may use it."""
    views = run / "views"
    with only_writer(views):
        assert view_store.main([str(views), "--objects", "3"]) == 0
        (views / "done.txt").write_text("2")
        assert view_store.main([str(views), "--objects", "3"]) == 2
    assert f"process {os.getpid()} is writing there: '{views}'" in capsys.readouterr().err


def test_half_of_a_save_that_a_kill_left_is_removed(run: Path) -> None:
    train_autoencoder(run)
    expected = sorted(path.name for path in (run / "autoencoder").iterdir())
    partial_path(run / "autoencoder" / "last.pt").write_bytes(NOISE)
    train_autoencoder(run)
    assert sorted(path.name for path in (run / "autoencoder").iterdir()) == expected


def test_a_run_of_another_recipe_is_told(run: Path, capsys: Capture) -> None:
    train_autoencoder(run)
    other = "architecture.latent_channels=8"
    assert f"'{run}/autoencoder/last.pt' does not fit" in told(capsys, run, "autoencoder", other)
    assert f"'{run}/autoencoder/mean.pt' does not fit" in told(capsys, run, "decoder", other)


def test_weights_of_another_stage_are_told(run: Path, capsys: Capture) -> None:
    """The image encoder would keep its random weights otherwise."""
    train_autoencoder(run)
    shutil.copytree(run / "autoencoder", run / "identity")
    assert f"'{run}/identity/mean.pt' does not fit" in told(capsys, run, "encode")


@pytest.mark.parametrize("text", ["", "x", "-3", "1.5"])
def test_a_count_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    assert read_count(tmp_path / "done.txt") == 0
    (tmp_path / "done.txt").write_text(text)
    with pytest.raises(ArrayError, match=f"holds '{text}', expected a number of rows"):
        read_count(tmp_path / "done.txt")


def test_more_objects_than_there_are_rows_are_told(run: Path) -> None:
    (run / "views" / "done.txt").write_text("99")
    with pytest.raises(StoreError, match=r"says 99 objects, expected 1 to 3"):
        ViewStore(run / "views")


@pytest.mark.parametrize("keep", [0, 60, 200_000])
def test_a_part_of_an_array_is_told(run: Path, keep: int, capsys: Capture) -> None:
    path = run / "views" / "scenes.npy"
    path.write_bytes(path.read_bytes()[:keep])
    sentence = f"'{path}' is no array, or only a part of one: delete '{path.parent}' to make it again"
    assert told(capsys, run, "autoencoder") == f"train: {sentence}"
    assert view_store.main([str(path.parent), "--objects", "3"]) == 2
    assert capsys.readouterr().err == f"view_store: {sentence}\n"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="files are as large as what is written")
def test_an_array_has_its_room_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk is full, writing through a map would end the process by a signal."""
    array = make_array(tmp_path / "a.npy", np.uint8, (1 << 20,))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= array.nbytes
    assert not mapped_array(tmp_path / "a.npy").any()

    def full(*_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(arrays.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        make_array(tmp_path / "b.npy", np.uint8, (1 << 20,))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


# --- runs that are stopped --------------------------------------------------------------------------------


def stop(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


def test_ctrl_c_ends_a_training_in_a_line_and_it_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("training.loop.Curves.row", stop)  # behind the first save
    arguments = [str(run / "tiny.toml"), "--folder", str(run), "--stage", "autoencoder"]
    assert command.main(arguments) == 130
    sentence = "train: interrupted; the same command goes on from what was saved last"
    assert capsys.readouterr().err.splitlines()[-1] == sentence
    monkeypatch.undo()
    assert torch.load(run / "autoencoder" / "last.pt", weights_only=True)["step"] == 1
    assert command.main(arguments) == 0


in_the_foreground = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="what runs in the background has no Ctrl-C"
)


@in_the_foreground
def test_ctrl_c_ends_drawing_in_a_line(tmp_path: Path) -> None:
    """A terminal sends it to the processes that draw, too."""
    drawing = [sys.executable, "-m", "training.data.view_store", str(tmp_path / "views"), "--objects", "500"]
    with subprocess.Popen(drawing, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "/500 object" in line)
        os.killpg(process.pid, signal.SIGINT)
        last = process.stderr.read().splitlines()[-1]
    assert last == "view_store: interrupted; the same command draws the objects that are left"
    assert process.returncode == 130
    assert 0 < read_count(tmp_path / "views" / "done.txt") < 500


@in_the_foreground
def test_ctrl_c_stops_the_trainings_of_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(train_card, "share_objects", lambda runs, _: runs)
    monkeypatch.setattr(train_card.Run, "start", lambda *_: sleeper)
    monkeypatch.setattr("training.train_card.time.sleep", stop)
    recipe = write_recipe(tmp_path / "tiny.toml", autoencoder={"minutes": 1.0})
    where = ["--folder", str(tmp_path), "--output", str(tmp_path / "packed")]
    assert train_card.main([str(recipe), "--minutes", "1e6", *where]) == 130
    assert sleeper.poll() is not None
    assert "train_card: interrupted; the same command goes on" in capsys.readouterr().err


# --- what a card is given ---------------------------------------------------------------------------------


def test_stages_that_cannot_be_trained_are_told_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(train_card, "draw_views", lambda *_: pytest.fail("objects were drawn"))
    recipe = write_recipe(tmp_path / "tiny.toml", autoencoder={"minutes": 1.0})

    def refused(*recipes: str, minutes: str = "1e6") -> str:
        more = ["--minutes", minutes, "--folder", tmp_path, "--output", tmp_path]
        return refusal(capsys, *recipes, *more, command=train_card.main)

    assert "anydoor has no stage 'autoencodr'; it has: views," in refused(f"{recipe}:autoencodr")
    assert "none of the stages has a share in the recipe" in refused(f"{recipe}:identity")
    assert "two recipes have one name" in refused(str(recipe), f"{recipe}:autoencoder")
    assert "--minutes is inf" in refused(str(recipe), minutes="inf")
    lost = write_recipe(tmp_path / "lost.toml", 'encoders = "lost.safetensors"', diffusion={"minutes": 1.0})
    assert "there is no checkpoint at 'lost.safetensors'" in refused(str(lost))


def test_a_recipe_in_which_nothing_learns_is_told(run: Path, capsys: Capture) -> None:
    task = IdentityTask.__init__

    def frozen(self: IdentityTask, *arguments: object) -> None:
        task(self, *arguments)  # type: ignore[arg-type]
        self.module.requires_grad_(False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IdentityTask, "__init__", frozen)
        assert "has no part of the network learn" in told(capsys, run, "identity")

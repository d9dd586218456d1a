"""Files that are written as a whole or not at all."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engines import files
from engines.files import only_writer, put_back, replacing, write_bytes, write_text


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.txt"
    write_text(path, "one")
    write_bytes(path, b"two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    for name in ("old", "new"):
        with replacing(path) as partial:
            partial.mkdir()
            (partial / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("as_folder", [False, True])
def test_after_an_error_everything_is_as_before(tmp_path: Path, as_folder: bool) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "before")

    def write_half() -> None:
        with replacing(path) as partial:
            if as_folder:
                partial.mkdir()
            else:
                partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_keeps_the_rights_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "private.png"
    path.touch(mode=0o600)
    write_bytes(path, b"picture")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_files_have_the_rights_of_any_new_file(tmp_path: Path, as_folder: bool) -> None:
    """Libraries make some that their owner alone may read."""
    (tmp_path / "new").touch()
    with replacing(tmp_path / "written") as partial:
        file = partial / "weights" / "data" if as_folder else partial
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    written = tmp_path / "written" / "weights" / "data" if as_folder else tmp_path / "written"
    assert written.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_name_may_have_all_of_its_255_bytes(tmp_path: Path) -> None:
    for name in ("n" * 251 + ".txt", "\u30ab" * 85):
        write_text(tmp_path / name, "written")
        assert (tmp_path / name).read_text() == "written"


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.txt").symlink_to("there/new.txt")
    write_text(tmp_path / "link.txt", "written")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "there" / "new.txt").read_text() == "written"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["new.txt"]


def fill(folder: Path, text: str) -> None:
    with only_writer(folder), replacing(folder) as partial:
        partial.mkdir()
        (partial / "a").write_text(text)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_there_is_a_folder_at_all_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    """Where the file system cannot swap two folders, the one that is killed in between leaves the old one."""
    folder = tmp_path / "bundle"
    fill(folder, "old")
    rename, seen = Path.rename, []

    def watch(path: Path, target: Path) -> Path:
        result = rename(path, target)
        seen.append(folder.exists())
        return result

    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", watch)
    fill(folder, "new")
    assert (folder / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]
    assert seen == ([] if can_exchange and sys.platform == "linux" else [False, True])


def test_a_folder_that_cannot_take_the_others_place_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the old one belongs to the image of a container: overlayfs does not rename it."""
    folder = tmp_path / "bundle"
    fill(folder, "old")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == folder:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path))
        return rename(path, target)

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="the new one is complete, at '") as error:
        fill(folder, "new")
    assert (folder / "a").read_text() == "old"
    (kept,) = set(tmp_path.iterdir()) - {folder}
    assert (kept / "a").read_text() == "new"
    assert error.value.strerror == f"{os.strerror(errno.EXDEV)}; the new one is complete, at '{kept}'"
    monkeypatch.undo()
    fill(folder, "newer")  # which removes what killed processes have left
    assert kept.is_dir()


def test_the_old_folder_is_put_back_where_the_new_one_cannot_be_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    fill(folder, "old")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target == folder and path.suffix == ".partial":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return rename(path, target)

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match="the new one is complete"):
        fill(folder, "new")
    assert (folder / "a").read_text() == "old"


def test_a_folder_that_a_killed_process_took_away_is_put_back(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    fill(folder, "old")
    folder.rename(tmp_path / ".bundle.old")
    put_back(folder)
    assert (folder / "a").read_text() == "old"
    put_back(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_what_killed_processes_have_left_in_a_folder_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    fill(folder, "old")
    files.partial_path(folder / "a").write_text("half")
    files.partial_path(folder / "b").mkdir()
    (folder / ".a.partial").write_text("of something else")
    with only_writer(folder):
        assert sorted(path.name for path in folder.iterdir()) == [".a.partial", "a"]


WRITER = """
import sys, time
from engines.files import only_writer, replacing
with only_writer(sys.argv[1]), replacing(sys.argv[1]) as partial:
    partial.mkdir()
    print("writing", flush=True)
    time.sleep(600)
"""


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """One that is writing a folder."""
    command = [sys.executable, "-c", WRITER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.kill()


def test_one_process_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    fill(folder, "old")
    with other_process(folder) as process:
        with pytest.raises(BlockingIOError, match=f"process {process.pid} is writing there"):
            fill(folder, "new")
        fill(tmp_path / "bundle.2", "another folder")
        assert len(list(tmp_path.glob(".bundle.*.partial"))) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (folder / "a").read_text() == "old"
    fill(folder, "new")
    assert (folder / "a").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.2"]


def test_many_take_turns(tmp_path: Path) -> None:
    """Whoever finds the lock taken is refused; none of the others is disturbed."""
    folder, written = tmp_path / "bundle", []

    def write() -> None:
        for _ in range(50):
            try:
                fill(folder, "whole")
            except BlockingIOError:
                continue
            written.append(os.getpid())

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written
    assert (folder / "a").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked there")
def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Else the folder of a killed training would stay locked as long as those that load its data live."""
    with only_writer(tmp_path / "bundle"):
        with pytest.raises(BlockingIOError), only_writer(tmp_path / "bundle"):
            pass
        context = multiprocessing.get_context("fork")
        (descriptor,), lock = files._HELD, tmp_path / ".bundle.lock"
        said = context.Queue()

        def has_it() -> bool:
            try:  # the number may be another file's by then, or nobody's
                return files._is_open_as(lock, descriptor)
            except OSError:
                return False

        child = context.Process(target=lambda: said.put(has_it()))
        child.start()
        assert said.get(timeout=60) is False
        child.join()
        assert files._is_open_as(lock, descriptor)
    assert not files._HELD

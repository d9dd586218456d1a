"""Files that were verified before are not read again, unless anything about them has changed."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

import engines.bundle
from engines.bundle import Bundle, ReplacedError
from engines.cache_folder import cache_folder
from engines.errors import BundleError
from engines.manifest import MANIFEST, Manifest
from engines.verified import FileState
from tests.support.anydoor import CONTROL, DENOISE

SIZE = 1000


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an empty cache folder would get the record."""
    monkeypatch.setenv("ANYDOOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ANYDOOR_VERIFY", raising=False)
    return tmp_path / "cache" / "anydoor" / "verified.json"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a bundle, to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def bytes_read(bundle: Path, graph: str = DENOISE, reread: bool = False) -> int:
    """How much a new process would read to verify a graph."""
    blocks: list[int] = []
    Bundle.open(bundle).verify(graph, blocks.append, reread)
    return sum(blocks)


def graph_bytes(bundle: Path, graph: str = DENOISE) -> int:
    return sum(file.bytes for file in Bundle.open(bundle).manifest.graphs[graph].all_files)


def corrupt(file: Path) -> None:
    """Changes a byte, in place: size and inode stay."""
    with file.open("r+b") as content:
        content.seek(100)
        byte = content.read(1)[0]
        content.seek(100)
        content.write(bytes([byte ^ 1]))


def refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"denoise\.onnx\.data is not the file that was built"):
        bytes_read(bundle)


def test_the_second_start_reads_nothing(bundle: Path, record: Path) -> None:
    assert bytes_read(bundle) == graph_bytes(bundle)
    assert bytes_read(bundle) == 0
    assert bytes_read(bundle, CONTROL) == graph_bytes(bundle, CONTROL)
    assert bytes_read(bundle) == 0
    assert list(record.parent.iterdir()) == [record]


def test_all_is_read_if_that_is_asked_for(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_read(bundle)
    assert bytes_read(bundle, reread=True) == graph_bytes(bundle)
    monkeypatch.setenv("ANYDOOR_VERIFY", "1")
    assert bytes_read(bundle) == graph_bytes(bundle)


def test_a_graph_that_is_loaded_again_is_read_only_if_it_has_changed(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened.verify(DENOISE)
    read: list[int] = []
    opened.verify(DENOISE, read.append)
    assert sum(read) == 0
    corrupt(bundle / "denoise.onnx.data")
    with pytest.raises(BundleError, match="is not the file that was built"):
        opened.verify(DENOISE)


def test_weights_of_a_bundle_that_has_taken_the_place_of_another_are_not_mixed_in(
    bundle: Path, tmp_path: Path
) -> None:
    """As where graphs are swapped while `anydoor build` replaces the folder."""
    opened = Bundle.open(bundle)
    opened.verify(DENOISE)
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    corrupt(other / "denoise.onnx.data")
    bundle.rename(tmp_path / "old")
    other.rename(bundle)
    for graph in (DENOISE, CONTROL):
        if graph == CONTROL:
            corrupt(bundle / "control.onnx.data")
        with pytest.raises(ReplacedError, match="was replaced after it was opened: load it again"):
            opened.verify(graph)


def test_a_bundle_that_is_replaced_while_it_is_opened_is_opened_again(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    content = json.loads((other / MANIFEST).read_text("utf-8"))
    (other / "denoise.onnx.data").write_bytes((other / "denoise.onnx.data").read_bytes() + b" ")
    files = content["graphs"][DENOISE]["files"]
    next(file for file in files if file["path"].endswith(".data"))["bytes"] += 1
    (other / MANIFEST).write_text(json.dumps(content), "utf-8")
    read = engines.bundle.read_manifest

    def replaced_meanwhile(*arguments: Any) -> Manifest:
        found = read(*arguments)
        if other.exists():
            bundle.rename(tmp_path / "old")
            other.rename(bundle)
        return found

    monkeypatch.setattr(engines.bundle, "read_manifest", replaced_meanwhile)
    assert Bundle.open(bundle).manifest.graphs[DENOISE].nbytes == sum(file["bytes"] for file in files)


def test_a_change_is_found(bundle: Path) -> None:
    bytes_read(bundle)
    corrupt(bundle / "denoise.onnx.data")
    refused(bundle)


def test_a_change_is_found_if_the_time_is_set_back(bundle: Path) -> None:
    """As programs do that copy a file with its times."""
    file = bundle / "denoise.onnx.data"
    bytes_read(bundle)
    before = file.stat()
    corrupt(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    refused(bundle)


def test_another_file_in_its_place_is_found(bundle: Path) -> None:
    file = bundle / "denoise.onnx.data"
    bytes_read(bundle)
    other = file.with_name("other")
    shutil.copy2(file, other)
    corrupt(other)
    other.replace(file)
    refused(bundle)


def test_another_hash_in_the_manifest_is_found(bundle: Path) -> None:
    bytes_read(bundle)
    manifest = bundle / "manifest.json"
    content = json.loads(manifest.read_text())
    content["graphs"][DENOISE]["files"][1]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    refused(bundle)


def test_what_was_refused_is_not_remembered(bundle: Path) -> None:
    corrupt(bundle / "denoise.onnx.data")
    for _ in range(2):
        refused(bundle)


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(SIZE))
    state = FileState.of(file, "the hash of what was read")
    corrupt(file)
    state.remember()
    assert state.is_verified()
    assert not FileState.of(file, "the hash of what was read").is_verified()


@pytest.mark.parametrize("name", ["moved", "link"])
def test_a_file_is_known_by_where_it_is(bundle: Path, name: str) -> None:
    """A link to a bundle is that bundle; a bundle that was moved is another one."""
    bytes_read(bundle)
    other = bundle.with_name(name)
    if name == "link":
        other.symlink_to(bundle)
    else:
        bundle.rename(other)
    assert bytes_read(other) == (0 if name == "link" else graph_bytes(other))


GARBAGE = (
    *(b"", b"{", b"[]", b"7", b"null", b'{"a": 1}', b"\xff\xfe\x00", b"[" * 100_000, b'{"\\u0000": {}}'),
    json.dumps({"/": "x" * 1000}).encode(),
)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_an_invalid_record_is_replaced(bundle: Path, record: Path, garbage: bytes) -> None:
    record.parent.mkdir(parents=True)
    record.write_bytes(garbage)
    assert bytes_read(bundle) == graph_bytes(bundle)
    assert bytes_read(bundle) == 0


def test_invalid_entries_are_replaced(bundle: Path, record: Path) -> None:
    bytes_read(bundle)
    paths = json.loads(record.read_text())
    for entry in (None, 7, [], {}, {"bytes": 1}):
        record.write_text(json.dumps(dict.fromkeys(paths, entry)))
        assert bytes_read(bundle) == graph_bytes(bundle)
        assert bytes_read(bundle) == 0


@pytest.mark.parametrize("obstacle", ["file in place of the folder", "folder in place of the record"])
def test_a_record_that_cannot_be_written_is_no_obstacle(bundle: Path, record: Path, obstacle: str) -> None:
    if obstacle.startswith("file"):
        record.parent.parent.write_bytes(b"")
    else:
        record.mkdir(parents=True)
    for _ in range(2):
        assert bytes_read(bundle) == graph_bytes(bundle)
    assert obstacle.startswith("file") or list(record.parent.iterdir()) == [record]


def test_a_user_without_a_home(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ANYDOOR_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() is None
    for _ in range(2):
        assert bytes_read(bundle) == graph_bytes(bundle)


def test_where_the_record_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("ANYDOOR_CACHE", "/own")
    assert cache_folder() == Path("/own/anydoor")
    monkeypatch.delenv("ANYDOOR_CACHE")
    assert cache_folder() == Path("/xdg/anydoor")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/somebody/.cache/anydoor")


def test_files_that_are_gone_leave_the_record(bundle: Path, record: Path) -> None:
    bytes_read(bundle)
    shutil.rmtree(bundle)
    file = record.with_name("file")
    file.write_bytes(bytes(SIZE))
    FileState.of(file, "hash").remember()
    assert list(json.loads(record.read_text())) == [str(file)]


def test_programs_that_write_at_the_same_time_leave_a_whole_record(tmp_path: Path, record: Path) -> None:
    files = [tmp_path / f"file {number}" for number in range(8)]
    for file in files:
        file.write_bytes(bytes(SIZE))

    def work(file: Path) -> None:
        for _ in range(20):
            FileState.of(file, "hash").remember()

    threads = [threading.Thread(target=work, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # one may have lost a race, but nothing is broken, and nothing lies beside it
    assert json.loads(record.read_text()).keys() <= {str(file) for file in files}
    assert list(record.parent.iterdir()) == [record]
    for file in files:
        FileState.of(file, "hash").remember()
    assert all(FileState.of(file, "hash").is_verified() for file in files)

"""Files that are written as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.files import replacing, write_bytes, write_text


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

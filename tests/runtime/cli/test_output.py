"""Outputs: refused before the work where they cannot be written, and never lost after it."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.cli import join_negative_values, main
from runtime.cli.output import check_output, write_output
from runtime.errors import InputError
from runtime.result import Composite
from tests.support.pictures import SCENE, Pixels, cutout

ROOT = Path(__file__).parents[3]


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    Image.fromarray(SCENE).save(path)
    return path


def result(image: Pixels = SCENE, seed: int = 7) -> Composite:
    return Composite(image, seed, (), {})


def wide(folder: Path, width: int) -> Path:
    path = folder / "wide.png"
    Image.new("RGB", (width, 4)).save(path)
    return path


# --- before the work --------------------------------------------------------------------------------------


def refused(output: Path, scene: Path, num_images: int = 1, grid: bool = False) -> str:
    before = sorted(output.parent.glob("**")) if output.parent.is_dir() else []
    with pytest.raises(InputError) as refusal:
        check_output(output, scene, num_images, grid)
    assert (sorted(output.parent.glob("**")) if output.parent.is_dir() else []) == before
    return str(refusal.value)


def test_places_that_cannot_be_written(scene: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert refused(tmp_path / "folder.png", scene).endswith("folder.png': it is a folder")
    assert refused(tmp_path / "pipe.png", scene).endswith("pipe.png': it is not a file")
    assert refused(scene / "out.png", scene).endswith("scene.png' is not a folder")
    assert "symbolic links" in refused(tmp_path / "loop.png", scene)
    assert "name too long" in refused(tmp_path / f"{'n' * 252}.png", scene)
    assert "name too long" in refused(tmp_path / f"{'n' * 250}.png", scene, num_images=2)
    assert "name too long" in refused(tmp_path / "none" / ("n" * 256) / "out.png", scene)
    assert "must end in" in refused(tmp_path / "out.txt", scene)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that nobody may write into")
def test_a_folder_that_nobody_may_write_into(scene: Path) -> None:
    for output in ("/proc/out.png", "/proc/none/out.png"):
        with pytest.raises(InputError, match=f"cannot write '{output}': "):
            check_output(Path(output), scene, 1, grid=False)


@pytest.mark.parametrize(
    ("name", "width", "count", "grid"),
    [
        ("out.webp", 16_384, 1, False),
        ("out.JPG", 65_501, 1, False),
        ("out.webp", 8_200, 4, True),
        ("out.jpg", 32_800, 2, True),
    ],
)
def test_formats_that_cannot_hold_the_picture(
    tmp_path: Path, name: str, width: int, count: int, grid: bool
) -> None:
    assert "write a .png" in refused(tmp_path / name, wide(tmp_path, width), count, grid)
    check_output(tmp_path / "out.png", wide(tmp_path, width), count, grid)


def test_places_that_can_be_written_are_left_as_they_are(scene: Path, tmp_path: Path) -> None:
    for output in (tmp_path / "new" / "folder" / "out.png", tmp_path / f"{'n' * 251}.png", scene):
        check_output(output, scene, 1, grid=False)
    assert list(tmp_path.iterdir()) == [scene]


# --- after it ---------------------------------------------------------------------------------------------


def test_folders_are_made_and_links_followed(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("new/real.png")
    long = tmp_path / f"{'n' * 251}.png"
    for output in (tmp_path / "new" / "folder" / "out.png", tmp_path / "link.png", long):
        write_output(output, [result()], grid=False)
        np.testing.assert_array_equal(np.asarray(Image.open(output)), SCENE)
    assert (tmp_path / "link.png").is_symlink()
    assert stat.S_ISREG((tmp_path / "new" / "real.png").lstat().st_mode)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_picture_that_cannot_be_written_is_kept_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that became a folder after the check; the other pictures are where they belong."""
    (tmp_path / "out-2.png").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    results = [result(np.full_like(SCENE, seed), seed) for seed in (1, 2, 3)]
    with pytest.raises(InputError) as refusal:
        write_output(tmp_path / "out.png", results, grid=False)
    (kept,) = (tmp_path / "elsewhere").iterdir()
    assert f"cannot write '{tmp_path}/out-2.png': Is a directory; " in str(refusal.value)
    assert str(refusal.value).endswith(f"the picture is kept as '{kept}'")
    for path, seed in ((tmp_path / "out-1.png", 1), (kept, 2), (tmp_path / "out-3.png", 3)):
        assert (np.asarray(Image.open(path)) == seed).all()


def test_a_picture_that_its_format_cannot_hold_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    image = np.zeros((1, 16_384, 3), np.uint8)
    with pytest.raises(InputError, match="WEBP allows sides of at most 16,383"):
        write_output(tmp_path / "out.webp", [result(image)], grid=False)
    (kept,) = tmp_path.iterdir()
    np.testing.assert_array_equal(np.asarray(Image.open(kept)), image)


# --- what is printed --------------------------------------------------------------------------------------

COMPOSITE = ["--reference", "object.png", "--scene", "scene.png", "--steps", "1", "--seed", "7", "--quiet"]


@pytest.fixture
def folder(tmp_path: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs, with a scene and an object."""
    Image.fromarray(cutout()).save(tmp_path / "object.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(bundle: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(ROOT / "anydoor_command.py"), "composite", *COMPOSITE, *arguments]
    command += ["--bundle", str(bundle)]
    return subprocess.run(command, check=False, stderr=subprocess.PIPE, **options)


def test_a_name_that_the_terminal_cannot_show(folder: Path, tiny_bundle: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = ["--box", "30,20,80,70", "-o", "каска.png"]
    done = run(tiny_bundle, *arguments, env=environment, stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stdout == rb"\u043a\u0430\u0441\u043a\u0430.png (seed 7)" + b"\n"
    assert (folder / "каска.png").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_terminal_that_takes_nothing(folder: Path, tiny_bundle: Path) -> None:
    """The picture is there all the same."""
    with Path("/dev/full").open("wb") as full:
        done = run(tiny_bundle, "--box", "30,20,80,70", "-o", "out.png", stdout=full)
    assert done.returncode == 2
    assert done.stderr == b"anydoor: cannot write to standard output: No space left on device\n"
    assert (folder / "out.png").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_picture_that_standard_output_does_not_take_is_kept(folder: Path, tiny_bundle: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(folder / "kept")}
    (folder / "kept").mkdir()
    with Path("/dev/full").open("wb") as full:
        done = run(tiny_bundle, "--box", "30,20,80,70", "-o", "-", stdout=full, env=environment)
    assert done.returncode == 2
    (kept,) = (folder / "kept").iterdir()
    sentence = "anydoor: cannot write to standard output: No space left on device; the picture is kept as"
    assert done.stderr.decode() == f"{sentence} '{kept}'\n"
    assert np.asarray(Image.open(kept)).shape == SCENE.shape


# --- negative numbers -------------------------------------------------------------------------------------


def test_a_box_may_cross_the_left_border(
    folder: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for box in (["--box", "-20,-5,80,70"], ["--box=-20,-5,80,70"]):
        assert (
            main(["composite", *COMPOSITE, *box, "-o", f"{len(box)}.png", "--bundle", str(tiny_bundle)]) == 0
        )
    assert (folder / "1.png").read_bytes() == (folder / "2.png").read_bytes()
    capsys.readouterr()


def test_values_that_begin_with_a_minus() -> None:
    assert join_negative_values(["--box", "-20,3,4,5", "--eta", "-.5", "-o", "-1.png", "--grid", "-v"]) == [
        *("--box=-20,3,4,5", "--eta=-.5", "-o", "-1.png", "--grid", "-v")
    ]
    assert join_negative_values(["-5", "--a=1", "-6"]) == ["-5", "--a=1", "-6"]


def test_output_of_tests_is_not_a_terminal() -> None:
    """`io.StringIO` as standard output has no encoding to mend."""
    stdout, sys.stdout = sys.stdout, io.StringIO()
    try:
        assert main(["composite", "--scene", "a.png", "--reference", "b.png", "-o", "none.txt"]) == 2
    finally:
        sys.stdout = stdout

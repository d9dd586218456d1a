"""`anydoor composite` with pictures and masks as people have them, and with standard input and output."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.cli import main
from tests.support.picture_files import encoded, icc_profile
from tests.support.pictures import SCENE, cutout

Capture = pytest.CaptureFixture[str]
BOX = (slice(20, 70), slice(30, 80))


@pytest.fixture
def composite(tmp_path: Path, tiny_bundle: Path) -> Callable[..., int]:
    """`anydoor composite` of a scene's file; keyword arguments change the others."""
    (tmp_path / "object.png").write_bytes(encoded(cutout()))

    def run(scene: bytes | str, *more: str, output: str = "out.png", box: str | None = "30,20,80,70") -> int:
        if isinstance(scene, bytes):
            (tmp_path / "scene").write_bytes(scene)
            scene = str(tmp_path / "scene")
        output = output if output == "-" else str(tmp_path / output)
        place = [f"--box={box}"] if box else []
        given = ["--reference", str(tmp_path / "object.png"), "--scene", scene, *place, "-o", output]
        options = ["--bundle", str(tiny_bundle), "--steps", "2", "--seed", "7", "--quiet"]
        return main(["composite", *given, *options, *more])

    return run


def test_transparent_scene_in_an_other_profile(
    composite: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    rgba = np.dstack([SCENE, np.full(SCENE.shape[:2], 255, np.uint8)])
    rgba[:40, :60] = (255, 0, 255, 0)
    profile = icc_profile()
    assert composite(encoded(rgba, icc_profile=profile, dpi=(300, 300)), "--mode", "keep_background") == 0
    assert "anydoor: warning: the scene is partly transparent" in capsys.readouterr().err
    written = Image.open(tmp_path / "out.png")
    result, inside = np.asarray(written), np.zeros(SCENE.shape[:2], np.bool_)
    inside[15:75, 25:85] = True
    np.testing.assert_array_equal(result[~inside], rgba[~inside])
    assert (result[25:65, 35:75, 3] == 255).all()
    assert written.info["icc_profile"] == profile
    assert written.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_contact_sheet_has_the_profile_of_its_pictures(composite: Callable[..., int], tmp_path: Path) -> None:
    assert composite(encoded(SCENE, icc_profile=icc_profile()), "--num-images", "2", "--grid") == 0
    assert Image.open(tmp_path / "out.png").info["icc_profile"] == icc_profile()


def test_plain_scene_gives_a_plain_file_without_a_word(
    composite: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    assert composite(encoded(SCENE)) == 0
    printed = capsys.readouterr().err.splitlines()
    assert all("pixels in the reference: with fewer than 128" in line for line in printed)
    assert Image.open(tmp_path / "out.png").info == {}


def test_specks_are_left_out_unless_kept(
    composite: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    place = np.zeros(SCENE.shape[:2], np.uint8)
    place[10:50, 20:60] = 255
    (tmp_path / "place.png").write_bytes(encoded(place))
    place[-1, -1] = 255
    (tmp_path / "stray.png").write_bytes(encoded(place))
    scene, masks = encoded(SCENE), [["--mask", str(tmp_path / name)] for name in ("place.png", "stray.png")]
    composite(scene, *masks[0], box=None, output="place-out.png")
    assert composite(scene, *masks[1], box=None, output="dropped.png") == 0
    assert "the scene mask has specks, 1 of its pixels" in capsys.readouterr().err
    composite(scene, *masks[1], "--keep-specks", box=None, output="kept.png")
    without, dropped, kept = (
        (tmp_path / name).read_bytes() for name in ("place-out.png", "dropped.png", "kept.png")
    )
    assert dropped == without
    assert kept != without


# --- standard input and output ----------------------------------------------------------------------------


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], io.BytesIO]:
    """Puts bytes into standard input; returns what standard output takes."""

    def put(content: bytes) -> io.BytesIO:
        output = io.BytesIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, write_through=True))
        return output

    return put


def test_dash_is_standard_input_and_output(
    composite: Callable[..., int], tmp_path: Path, streams: Callable[[bytes], io.BytesIO]
) -> None:
    composite(encoded(SCENE))
    output = streams(encoded(SCENE))
    assert composite("-", output="-") == 0
    assert output.getvalue() == (tmp_path / "out.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--reference", "-", "--box", "1,1,20,20"), "standard input holds one picture, but several are -"),
        (
            ("--num-images", "2"),
            "standard output holds one picture: write one, or a contact sheet",
        ),
    ],
)
def test_streams_hold_one_picture(
    composite: Callable[..., int],
    streams: Callable[[bytes], io.BytesIO],
    arguments: tuple[str, ...],
    sentence: str,
    capsys: Capture,
) -> None:
    output = streams(encoded(SCENE))
    assert composite("-", *arguments, output="-") == 2
    assert sentence in capsys.readouterr().err
    assert output.getvalue() == b""


def test_empty_standard_input(
    composite: Callable[..., int], streams: Callable[[bytes], io.BytesIO], capsys: Capture
) -> None:
    streams(b"")
    assert composite("-") == 2
    assert "the scene is empty" in capsys.readouterr().err

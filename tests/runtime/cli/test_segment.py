"""`anydoor segment`, and references whose object is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from runtime.cli import main, progress
from runtime.imaging.masks import load_mask
from runtime.segmentation import Segmenter
from tests.support.segmenters import bright_things


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    Image.fromarray(bright_things()).save(tmp_path / "shelf.png")
    return tmp_path / "shelf.png"


def test_what_is_clicked_on_is_written_as_a_mask(
    shelf: Path, segmenter_bundles: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output, sam = shelf.with_name("mask.png"), str(segmenter_bundles[1])
    clicks = ["--click", "20,20", "--click", "!70,30"]
    assert main(["segment", str(shelf), *clicks, "--segmenter", sam, "-o", str(output)]) == 0
    expected = Segmenter.load(sam).mask(shelf, [(20, 20), (70, 30, False)])
    np.testing.assert_array_equal(load_mask(output, "the mask"), expected)
    assert f"{output} ({np.count_nonzero(expected)} of 4608 pixels, score 0." in capsys.readouterr().out


def test_a_plain_background_needs_no_segmenter(tmp_path: Path) -> None:
    picture = np.full((60, 80, 3), 230, np.uint8)
    picture[20:40, 30:50] = (20, 90, 200)
    Image.fromarray(picture).save(tmp_path / "cup.png")
    assert main(["segment", str(tmp_path / "cup.png"), "-o", str(tmp_path / "mask.png")]) == 0
    inside = load_mask(tmp_path / "mask.png", "the mask")
    np.testing.assert_array_equal(inside, (picture != 230).all(axis=2))


def plain_picture(path: Path, columns: slice) -> NDArray[np.bool_]:
    """Writes a picture with a plain background, and returns where its object is."""
    picture = np.full((60, 80, 3), 230, np.uint8)
    picture[20:40, columns] = (20, 90, 200)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(picture).save(path)
    return (picture != 230).all(axis=2)


def test_masks_of_several_pictures_lie_in_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture without an object stops none of the others; the last line names it."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    cups = {
        name: plain_picture(tmp_path / f"{name}.png", slice(10 * i + 10, 50)) for i, name in enumerate("abc")
    }
    Image.fromarray(np.full((60, 80, 3), 230, np.uint8)).save(tmp_path / "b.png")
    pictures = [str(tmp_path / f"{name}.png") for name in cups]
    assert main(["segment", *pictures, "-o", str(tmp_path / "masks")]) == 2
    output = capsys.readouterr()
    for name in "ac":
        inside = load_mask(tmp_path / "masks" / f"{name}.png", "the mask")
        np.testing.assert_array_equal(inside, cups[name])
        assert f"{tmp_path / 'masks' / name}.png (" in output.out
    assert not (tmp_path / "masks/b.png").exists()
    assert "anydoor: picture 2 of 3\n" in output.err
    assert f"anydoor: '{pictures[1]}' has no mask: " in output.err
    assert "1 of 3 pictures have no mask; the others are done" in output.err


def test_one_picture_may_have_its_mask_in_a_folder(tmp_path: Path) -> None:
    inside = plain_picture(tmp_path / "cup.png", slice(30, 50))
    (tmp_path / "masks").mkdir()
    assert main(["segment", str(tmp_path / "cup.png"), "-o", str(tmp_path / "masks")]) == 0
    np.testing.assert_array_equal(load_mask(tmp_path / "masks/cup.png", "the mask"), inside)


@pytest.mark.parametrize(
    ("names", "output", "refusal"),
    [
        (["a/cup.png", "b/cup.png"], "masks", "would be the mask of "),
        (["a/cup.png", "b/bear.png"], "a", "a mask would replace the picture "),
        (["a/cup.png", "-"], "masks", "the mask of standard input has no name in a folder"),
        (["a/cup.png", "b/bear.png"], "-", "standard output holds one mask"),
    ],
)
def test_masks_that_would_collide_are_refused_before_the_work(
    tmp_path: Path,
    names: list[str],
    output: str,
    refusal: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in names:
        if name != "-":
            plain_picture(Path(name), slice(30, 50))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert main(["segment", *names, "-o", output]) == 2
    assert refusal in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (
            ["--click", "20,20"],
            "no segmenter for clicks and boxes is loaded: give a mask, or the bundle of one",
        ),
        (
            ["--click", "20,20", "--box", "1,2,3,4"],
            "--click and --box cannot be used together: give one of them",
        ),
        (["--server", "gpu:1", "--segmenter", "sam"], "--segmenter has no effect with --server"),
        (["--segmenter", "nowhere"], "there is no bundle at 'nowhere'"),
    ],
)
def test_refusals(
    shelf: Path, arguments: list[str], refusal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shelf.with_name("mask.png")
    assert main(["segment", str(shelf), *arguments, "-o", str(output)]) == 2
    assert refusal in capsys.readouterr().err
    assert not output.exists()


def test_a_click_that_is_none(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["segment", str(shelf), "--click", "here", "-o", "mask.png"])
    assert caught.value.code == 2
    assert "'here' is not a click: two whole numbers x,y are expected" in capsys.readouterr().err


def test_clicks_belong_to_the_reference_before_them(
    shelf: Path,
    example_bundle: Path,
    segmenter_bundles: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    scene = shelf.with_name("scene.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)).save(scene)
    segmenters = [part for path in segmenter_bundles for part in ("--segmenter", str(path))]
    common = [
        "--scene",
        str(scene),
        "--bundle",
        str(example_bundle),
        *segmenters,
        "--steps",
        "1",
        "--seed",
        "3",
    ]

    def drawn(*arguments: str) -> bytes:
        output = shelf.with_name("out.png")
        places = ["--box", "2,2,30,30", "--box", "40,20,70,50"]
        assert main(["composite", *arguments, *places, *common, "--quiet", "-o", str(output)]) == 0
        return output.read_bytes()

    reference, masks = ["--reference", str(shelf)], []
    for index, click in enumerate([(20, 20), (70, 30)]):
        masks.append(shelf.with_name(f"mask{index}.png"))
        Image.fromarray(Segmenter.load(segmenter_bundles[1]).mask(shelf, [click])).save(masks[-1])
    clicked = [*reference, "--reference-click", "20,20", *reference, "--reference-click", "70,30"]
    masked = [part for mask in masks for part in (*reference, "--reference-mask", str(mask))]
    assert drawn(*clicked) == drawn(*masked)
    assert drawn(*[*reference, "--reference-mask", "auto"] * 2)
    assert main(
        ["composite", "--reference-click", "2,2", *reference, "--box", "2,2,30,30", *common, "-o", "x.png"]
    )
    assert "--reference-click needs a --reference before it" in capsys.readouterr().err

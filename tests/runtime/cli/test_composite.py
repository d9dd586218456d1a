"""`anydoor composite`, as a user meets it: files in, a file out, or one sentence and exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.cli import main
from tests.support.pictures import SCENE, Pixels, cutout, picture

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A scene, an object with transparency, one without, and a mask."""
    Image.fromarray(SCENE).save(tmp_path / "scene.png")
    Image.fromarray(cutout()).save(tmp_path / "object.png")
    Image.fromarray(picture(40, 40)).save(tmp_path / "opaque.png")
    mask = np.zeros(SCENE.shape[:2], np.uint8)
    mask[20:70, 30:80] = 255
    Image.fromarray(mask).save(tmp_path / "place.png")
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "nothing.png")
    return tmp_path


@pytest.fixture
def composite(folder: Path, tiny_bundle: Path) -> Callable[..., int]:
    """`anydoor composite` with sensible arguments; keyword arguments change them, None leaves one out."""

    def run(*more: str, **changes: str | None) -> int:
        options: dict[str, str | None] = {
            "reference": str(folder / "object.png"),
            "scene": str(folder / "scene.png"),
            "box": "30,20,80,70",
            "output": str(folder / "out.png"),
            "bundle": str(tiny_bundle),
            "steps": "2",
            "seed": "7",
            **changes,
        }
        given = [
            part for k, v in options.items() if v is not None for part in (f"--{k.replace('_', '-')}", v)
        ]
        return main(["composite", *given, "--quiet", *more])

    return run


def read(path: Path) -> Pixels:
    return np.asarray(Image.open(path))


def test_composite_writes_the_picture_and_tells_its_seed(
    composite: Callable[..., int], folder: Path, capsys: Capture
) -> None:
    assert composite() == 0
    assert "out.png (seed 7)" in capsys.readouterr().out
    assert read(folder / "out.png").shape == SCENE.shape
    assert not list(folder.glob("*.partial"))


def test_same_command_same_bytes(composite: Callable[..., int], folder: Path) -> None:
    composite()
    first = (folder / "out.png").read_bytes()
    composite()
    assert (folder / "out.png").read_bytes() == first


def test_mask_says_the_same_place_as_its_box(composite: Callable[..., int], folder: Path) -> None:
    composite()
    composite(box=None, mask=str(folder / "place.png"), output=str(folder / "by_mask.png"))
    np.testing.assert_array_equal(read(folder / "by_mask.png"), read(folder / "out.png"))


def test_random_seed_is_told(composite: Callable[..., int], folder: Path, capsys: Capture) -> None:
    composite(seed=None)
    first = read(folder / "out.png")
    seed = capsys.readouterr().out.split("(seed ")[1].rstrip(")\n")
    composite(seed=seed)
    np.testing.assert_array_equal(read(folder / "out.png"), first)


def test_several_pictures_are_numbered(composite: Callable[..., int], folder: Path, capsys: Capture) -> None:
    assert composite(num_images="2") == 0
    assert {"out-1.png", "out-2.png"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "out.png").exists()


def test_grid_is_one_contact_sheet(composite: Callable[..., int], folder: Path) -> None:
    assert composite("--grid", num_images="4") == 0
    height, width = SCENE.shape[:2]
    assert read(folder / "out.png").shape == (2 * height + 8, 2 * width + 8, 3)


def test_two_objects(composite: Callable[..., int], folder: Path) -> None:
    second = ["--reference", str(folder / "object.png"), "--box", "90,60,115,85"]
    assert composite(*second, mode="keep_background") == 0
    changed = (read(folder / "out.png") != SCENE).any(axis=-1)
    assert changed[30:60, 40:70].any()
    assert changed[65:80, 95:110].any()
    assert not changed[:15].any()


def test_initial_noise_overrides_the_seed(composite: Callable[..., int], folder: Path) -> None:
    np.save(folder / "noise.npy", np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32))
    pictures = []
    for seed in ("1", "2"):
        composite(seed=seed, initial_noise=str(folder / "noise.npy"))
        pictures.append(read(folder / "out.png"))
    np.testing.assert_array_equal(*pictures)


def spoil(folder: Path, name: str) -> str:
    content = (folder / name).read_bytes()
    path = folder / f"spoilt_{name}"
    path.write_bytes(content[: len(content) // 2])
    return str(path)


def wide(folder: Path, width: int) -> str:
    path = folder / "wide.png"
    Image.new("RGB", (width, 4)).save(path)
    return str(path)


def folder_named(path: Path) -> Path:
    path.mkdir()
    return path


BAD_INPUT = {
    "scene is no picture": (lambda f: {"scene": __file__}, "is not a picture"),
    "scene is missing": (lambda f: {"scene": str(f / "none.png")}, "No such file"),
    "truncated scene": (lambda f: {"scene": spoil(f, "scene.png")}, "damaged or cut short"),
    "reference without mask": (lambda f: {"reference": str(f / "opaque.png")}, "give a reference mask"),
    "empty reference mask": (lambda f: {"reference_mask": str(f / "nothing.png")}, "is empty"),
    "reference mask of another size": (
        lambda f: {"reference_mask": str(f / "place.png")},
        "they must have the same size",
    ),
    "scene mask of another size": (
        lambda f: {"box": None, "mask": str(f / "nothing.png")},
        "they must have the same size",
    ),
    "box outside": (lambda f: {"box": "200,200,300,300"}, "lies outside the scene"),
    "box without area": (lambda f: {"box": "30,20,30,70"}, "has no area"),
    "incomplete box": (lambda f: {"box": "30,20,30"}, "is not a box"),
    "no place": (lambda f: {"box": None}, "every reference needs one place"),
    "no bundle": (lambda f: {"bundle": str(f / "none")}, "no bundle at"),
    "steps": (lambda f: {"steps": "0"}, "steps must be"),
    "guidance_scale": (lambda f: {"guidance_scale": "nan"}, "guidance_scale must be"),
    "ratio": (lambda f: {"crop_ratio": "0.5"}, "ratio"),
    "output ending": (lambda f: {"output": str(f / "out.txt")}, "its name must end in"),
    "output below a file": (lambda f: {"output": str(f / "scene.png" / "out.png")}, "is not a folder"),
    "output is a folder": (lambda f: {"output": str(folder_named(f / "out.png"))}, "it is a folder"),
    "one of several outputs is a folder": (
        lambda f: {"output": str(folder_named(f / "out-2.png").with_name("out.png")), "num_images": "2"},
        "out-2.png': it is a folder",
    ),
    "format that cannot hold the picture": (
        lambda f: {"scene": wide(f, 16_384), "output": str(f / "out.webp")},
        "WEBP allows sides of at most 16,383: write a .png",
    ),
    "no such mask level": (lambda f: {"mask_level": "4"}, "no mask level 4: choose one of 0 (exact), 1"),
    "a mask level where none is used": (lambda f: {"mask_level": "blob"}, "AnyDoor has no mask_level"),
    "noise is no array": (lambda f: {"initial_noise": __file__}, "a .npy file is expected"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    composite: Callable[..., int], folder: Path, capsys: Capture, case: str
) -> None:
    changes, sentence = BAD_INPUT[case]
    arguments = changes(folder)
    before = sorted(folder.iterdir())
    try:
        code = composite(**arguments)
    except SystemExit as exit_:  # argparse leaves this way
        code = exit_.code if isinstance(exit_.code, int) else -1
    printed = capsys.readouterr()
    assert code == 2
    assert sentence in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.strip().splitlines()[-1]) > 20
    assert sorted(folder.iterdir()) == before


def test_corrupt_bundle_file(
    composite: Callable[..., int], folder: Path, tiny_bundle: Path, capsys: Capture
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, folder / "bundle"))
    content = bytearray((bundle / "denoise.onnx.data").read_bytes())
    content[1000] ^= 255
    (bundle / "denoise.onnx.data").write_bytes(content)
    assert composite(bundle=str(bundle)) == 2
    assert "denoise.onnx.data is not the file that was built" in capsys.readouterr().err
    assert not (folder / "out.png").exists()


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("backend", "tensorrt", "runs with the backend openvino or onnxruntime, not with tensorrt"),
        ("inference_precision", "bf16", "only the backend openvino has the inference precision bf16"),
        ("memory_budget", "1K", "MB of memory, but 0 MB may be used: raise --memory-budget"),
        ("control_window", "0", "control_window must be from 1 to 4, the bundle's max_batch, not 0"),
        ("control_window", "5", "control_window must be from 1 to 4, the bundle's max_batch, not 5"),
    ],
)
def test_machine_options_that_do_not_fit(
    composite: Callable[..., int], capsys: Capture, option: str, value: str, sentence: str
) -> None:
    assert composite(**{"backend": "onnxruntime", option: value}) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--reference", "b.png", *["--box", "1,2,3,4"] * 2],
            "2 --reference and 3 --box or --mask are given",
        ),
        (["--box", "1,2,3,4"], "1 --reference and 2 --box or --mask are given"),
        (
            ["--reference", "b.png", "--mask", "b_place.png", "--reference-mask", "a_mask.png"],
            "2 --reference and 1 --reference-mask are given: give one per reference, or none",
        ),
        (["--timeout", "3"], "--timeout needs --server"),
        (["--tls"], "--tls needs --server"),
        (["--token-file", "token"], "--token-file needs --server"),
        (
            ["--server", "a:1", "--backend", "openvino"],
            "--backend has no effect with",
        ),
        (["--server", "a:1", "--memory-budget", "6G"], "--memory-budget has no effect with --server"),
        (["--server", "a:1", "--control-window", "2"], "--control-window has no effect with --server"),
        (["--server", "a:1", "--initial-noise", "noise.npy"], "--initial-noise has no effect with --server"),
        (["--output", "out.txt"], "its name must end in .png, .jpg, .jpeg, .webp"),
        (["--output", "/dev/null/out.png"], "'/dev/null' is not a folder"),
        (["--threads", "0"], "threads must be at least 1, not 0"),
        (["--num-images", "1000000000"], "num_images must be a whole number from 1 to 64, not 1000000000"),
    ],
)
def test_what_can_be_refused_is_refused_before_anything_is_opened(
    folder: Path, capsys: Capture, more: list[str], sentence: str
) -> None:
    """Neither bundle nor pictures are there."""
    command = ["composite", "--reference", "a.png", "--scene", "s.png", "--box", "1,2,3,4", "-o", "out.png"]
    bundle = [] if "--server" in more else ["--bundle", str(folder / "none")]
    assert main([*command, *bundle, *more]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"PK\3\4", b"\x93NUMPY\1\0\6\0{((((\n"], ids=["archive", "header"])
def test_noise_that_is_damaged(tmp_path: Path, capsys: Capture, content: bytes) -> None:
    (tmp_path / "noise.npy").write_bytes(content)
    command = ["composite", "--reference", "a.png", "--scene", "s.png", "--box", "1,2,3,4", "-o", "out.png"]
    assert main([*command, "--initial-noise", str(tmp_path / "noise.npy")]) == 2
    assert "cannot read the initial noise" in capsys.readouterr().err


def test_a_token_file_without_a_token(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "token").write_text("\n")
    command = ["composite", "--reference", "a.png", "--scene", "s.png", "--box", "1,2,3,4", "-o", "out.png"]
    assert main([*command, "--server", "a:1", "--token-file", str(tmp_path / "token")]) == 2
    assert "there is no token in" in capsys.readouterr().err


def test_a_certificate_needs_its_key(capsys: Capture) -> None:
    command = ["composite", "--reference", "a.png", "--scene", "s.png", "--box", "1,2,3,4", "-o", "out.png"]
    assert main([*command, "--server", "a:1", "--tls-certificate", "a.pem"]) == 2
    assert "--tls-certificate and --tls-key must be given together" in capsys.readouterr().err


def test_what_is_left_open_comes_from_the_bundle(
    composite: Callable[..., int], folder: Path, tiny_bundle: Path
) -> None:
    """The same picture, whether the bundle says the parameters or the flags do."""
    parameters = {"steps": "3", "guidance_scale": "1.5", "mode": "keep_background", "crop_ratio": "1.3"}
    assert composite(**parameters) == 0
    bundle = Path(shutil.copytree(tiny_bundle, folder / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["defaults"] = {"steps": 3, "guidance_scale": 1.5, "mode": "keep_background", "crop_ratio": 1.3}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert composite(bundle=str(bundle), steps=None, output=str(folder / "open.png")) == 0
    np.testing.assert_array_equal(read(folder / "open.png"), read(folder / "out.png"))


def test_the_bundle_of_the_environment(
    composite: Callable[..., int], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYDOOR_BUNDLE", str(tiny_bundle))
    assert composite(bundle=None) == 0


def test_without_a_terminal_progress_is_a_few_lines(folder: Path, tiny_bundle: Path, capsys: Capture) -> None:
    command = ["composite", "--reference", str(folder / "object.png"), "--scene", str(folder / "scene.png")]
    target = ["--box", "30,20,80,70", "--output", str(folder / "out.png")]
    assert main([*command, *target, "--bundle", str(tiny_bundle), "--steps", "4"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "anydoor: step 4 of 4" in lines
    assert all("\r" not in line for line in lines)


def test_less_strength_starts_from_the_object(composite: Callable[..., int], folder: Path) -> None:
    for name, more in (("full", ()), ("half", ("--strength", "0.5"))):
        assert composite(*more, steps="4", output=str(folder / f"{name}.png")) == 0
    assert (read(folder / "full.png") != read(folder / "half.png")).any()


def test_a_large_place_is_refined(composite: Callable[..., int], folder: Path) -> None:
    large = "5,5,115,85"
    for name, more in (("once", ()), ("again", ("--refine",)), ("noisier", ("--refine", "600"))):
        assert composite(*more, box=large, steps="5", output=str(folder / f"{name}.png")) == 0
    once, again, noisier = (read(folder / f"{name}.png") for name in ("once", "again", "noisier"))
    assert (once != again).any()
    assert (again != noisier).any()

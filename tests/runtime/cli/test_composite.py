"""The command line, as a user meets it: files in, a file out, or one sentence and exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.bundle import Bundle
from engines.verified import FileState
from runtime.cli.composite import main
from tests.runtime.test_compositor import SCENE, cutout, picture

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


def read(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
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
    "box that is none": (lambda f: {"box": "30,20,30"}, "is not a box"),
    "no place": (lambda f: {"box": None}, "every reference needs one place"),
    "no bundle": (lambda f: {"bundle": str(f / "none")}, "no bundle at"),
    "steps": (lambda f: {"steps": "0"}, "steps must be"),
    "guidance_scale": (lambda f: {"guidance_scale": "nan"}, "guidance_scale must be"),
    "ratio": (lambda f: {"crop_ratio": "0.5"}, "ratio"),
    "output ending": (lambda f: {"output": str(f / "out.txt")}, "its name must end in"),
    "output folder": (lambda f: {"output": str(f / "none" / "out.png")}, "cannot write"),
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
        ("memory_budget", "1K", "MB of memory and 0 MB may be used: raise --memory-budget"),
        ("control_window", "0", "control_window must be from 1 to 4, the bundle's max_batch, not 0"),
        ("control_window", "5", "control_window must be from 1 to 4, the bundle's max_batch, not 5"),
    ],
)
def test_machine_options_that_do_not_fit(
    composite: Callable[..., int], capsys: Capture, option: str, value: str, sentence: str
) -> None:
    assert composite(**{"backend": "onnxruntime", option: value}) == 2
    assert sentence in capsys.readouterr().err


def test_doctor_finds_a_sound_bundle(tiny_bundle: Path, capsys: Capture) -> None:
    assert main(["doctor", str(tiny_bundle)]) == 0
    printed = capsys.readouterr().out
    assert "onnxruntime" in printed
    assert "sound" in printed


def test_serve_takes_the_same_window(
    tiny_bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.server.serve.configure", lambda level: None)  # of all logging
    assert main(["serve", "--bundle", str(tiny_bundle), "--control-window", "5"]) == 2
    assert "control_window must be from 1 to 4" in capsys.readouterr().err


def test_doctor_reads_what_was_found_sound_before(folder: Path, tiny_bundle: Path, capsys: Capture) -> None:
    """A disk may lose bits without a write, which leaves every time of the file as it was."""
    bundle = Path(shutil.copytree(tiny_bundle, folder / "bundle"))
    assert main(["doctor", str(bundle)]) == 0
    file = bundle / "decode.onnx"
    file.write_bytes(b"x" * file.stat().st_size)
    record = json.loads((bundle / "manifest.json").read_text())["graphs"]["decode"]["files"][0]
    FileState.of(file, record["sha256"]).remember()
    Bundle.open(bundle).verify("decode")
    assert main(["doctor", str(bundle)]) == 2
    assert "decode.onnx is not the file that was built" in capsys.readouterr().out


def test_doctor_finds_a_damaged_bundle(folder: Path, tiny_bundle: Path, capsys: Capture) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, folder / "bundle"))
    (bundle / "decode.onnx").write_bytes(b"x" * (bundle / "decode.onnx").stat().st_size)
    assert main(["doctor", str(bundle)]) == 2
    assert "unusable: the bundle at" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["--help"], ["composite", "--help"], ["doctor", "--help"]])
def test_help(command: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 0
    assert "anydoor" in capsys.readouterr().out

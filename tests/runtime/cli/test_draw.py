"""`anydoor draw`, and `anydoor composite` with a prompt, on this machine and on a server."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.cli import main
from tests.support.pictures import SCENE, Pixels
from tests.support.serving import ServerThread
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

Capture = pytest.CaptureFixture[str]

DRAW = ["draw", "--prompt", "a cat", "--steps", "2", "--seed", "7", "--quiet"]
COMPOSITE = [
    "composite",
    "--prompt",
    "a cat",
    "--box",
    "30,20,80,70",
    "--steps",
    "2",
    "--seed",
    "7",
    "--quiet",
]


@pytest.fixture(scope="module")
def bundle() -> Path:
    return tiny_stable_diffusion_bundle(4)


@pytest.fixture(autouse=True)
def no_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier test of the server has set up writes to a stream that is closed."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(bundle) as server:
        yield server


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    Image.fromarray(SCENE).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def read(path: Path) -> Pixels:
    return np.asarray(Image.open(path))


def test_a_drawing_is_written_and_its_seed_told(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.png"
    assert main([*DRAW, "--bundle", str(bundle), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out} (seed 7)\n"
    assert read(out).shape == (64, 64, 3)


def test_a_server_draws_the_same(bundle: Path, server: ServerThread, tmp_path: Path) -> None:
    here, there = tmp_path / "here.png", tmp_path / "there.png"
    more = ["--negative-prompt", "the castle", "--num-images", "2", "--grid"]
    assert main([*DRAW, *more, "--bundle", str(bundle), "-o", str(here)]) == 0
    assert main([*DRAW, *more, "--server", server.address, "-o", str(there)]) == 0
    assert read(here).shape == (64, 2 * 64 + 8, 3)
    assert np.abs(read(here).astype(int) - read(there)).max() <= 1


def test_prompts_are_composited(bundle: Path, server: ServerThread, scene: Path, tmp_path: Path) -> None:
    """Two of them, with a place each; here and on a server."""
    second = ["--prompt", "the castle", "--box", "90,60,115,85", "--negative-prompt", "a red car"]
    outputs = []
    for where in (["--bundle", str(bundle)], ["--server", server.address]):
        outputs.append(tmp_path / f"{where[0]}.png")
        assert main([*COMPOSITE, *second, *where, "--scene", str(scene), "-o", str(outputs[-1])]) == 0
    here, there = map(read, outputs)
    assert np.abs(here.astype(int) - there).max() <= 1
    changed = (here != SCENE).any(axis=-1)
    assert changed[25:65, 35:75].mean() > 0.9
    assert changed[65:80, 95:110].mean() > 0.9
    assert not changed[:8].any()


@pytest.mark.parametrize("at_a_server", [False, True])
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--size", "96x64"], "draws pictures of 64 x 64 pixels and not of 96 x 64"),
        (["--quality", "fast"], "the quality 'fast' is not offered for Stable Diffusion"),
        (["--control-scale", "0.5"], "Stable Diffusion has no control_scale"),
        (["--prompt", "cat " * 76], "longer than the 75 tokens"),
        (["--prompt", "\ud83d"], "U+D83D, half of a surrogate pair"),
        (["--steps", "0"], "steps must be a whole number from 1"),
    ],
)
def test_what_the_model_cannot_use(
    bundle: Path,
    server: ServerThread,
    tmp_path: Path,
    capsys: Capture,
    more: list[str],
    sentence: str,
    at_a_server: bool,
) -> None:
    where = ["--server", server.address] if at_a_server else ["--bundle", str(bundle)]
    assert main([*DRAW, *more, *where, "-o", str(tmp_path / "out.png")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--prompt", "a dog"], "2 --prompt and 1 --box or --mask are given: every prompt needs one place"),
        (
            ["--reference", "b.png", "--box", "1,2,3,4"],
            "--reference and --prompt cannot be used together: give one",
        ),
        (["--reference-mask", "a.png"], "0 --reference and 1 --reference-mask are given"),
    ],
)
def test_flags_that_do_not_fit_together(
    scene: Path, tmp_path: Path, capsys: Capture, more: list[str], sentence: str
) -> None:
    assert main([*COMPOSITE, *more, "--scene", str(scene), "-o", str(tmp_path / "out.png")]) == 2
    assert sentence in capsys.readouterr().err


def test_there_must_be_something_to_place(scene: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["composite", "--scene", str(scene), "--box", "1,2,3,4", "-o", str(tmp_path / "out.png")]
    assert main(command) == 2
    assert "nothing to place: give a --reference or a --prompt" in capsys.readouterr().err


def test_anydoor_draws_nothing_from_words(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main([*DRAW, "--bundle", str(tiny_bundle), "-o", str(tmp_path / "out.png")]) == 2
    assert "AnyDoor puts objects from pictures into scenes" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["", "x", "64x", "64x64x3", "a", "-64x64", "6.5x4"])
def test_a_size_is_two_numbers(size: str, tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*DRAW, f"--size={size}", "-o", str(tmp_path / "out.png")])
    assert caught.value.code == 2
    assert f"'{size}' is not a size: a width and a height are expected" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(tmp_path: Path, capsys: Capture) -> None:
    """Before the bundle is opened, which is not there."""
    (tmp_path / "file").touch()
    where = ["--bundle", str(tmp_path / "none"), "-o", str(tmp_path / "file" / "out.png")]
    assert main([*DRAW, *where]) == 2
    assert "is not a folder" in capsys.readouterr().err

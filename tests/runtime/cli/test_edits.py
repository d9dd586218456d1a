"""The commands that edit a scene, on this machine and on a server; what is refused, in one sentence."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from PIL import Image

from runtime.cli import main
from runtime.imaging.holes import hole_of
from runtime.request import Action, Edit, Move, Remove, SwapPlaces, Where
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.edit_wire import message_from_edit
from tests.support.imprint import tiny_imprint_bundle
from tests.support.segmenters import WHITE, bright_things
from tests.support.serving import ServerThread, object_array, refusal
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

Capture = pytest.CaptureFixture[str]

SHELF = bright_things()
CUP, TALL = np.zeros((2, *SHELF.shape[:2]), bool)
CUP[WHITE] = True
TALL[4:40, 16:32] = True


@pytest.fixture(autouse=True)
def no_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier test of the server has set up writes to a stream that is closed."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shelf, an object, and masks of the shelf."""
    pictures = {"shelf": SHELF, "vase": object_array(), "cup": CUP, "tall": TALL}
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    Image.fromarray(np.ones(CUP.shape, bool)).save(tmp_path / "all.png")
    Image.fromarray(np.zeros(CUP.shape, bool)).save(tmp_path / "nothing.png")
    return tmp_path


@pytest.fixture(scope="module")
def here(tiny_bundle: Path, segmenter_bundles: tuple[Path, Path]) -> list[str]:
    """Flags of this machine."""
    segmenters = [part for path in segmenter_bundles for part in ("--segmenter", str(path))]
    return ["--bundle", str(tiny_bundle), *segmenters, "--threads", "1", "--backend", "onnxruntime"]


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, segmenter_bundles: tuple[Path, Path]) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle, segmenter=tuple(map(str, segmenter_bundles))) as running:
        yield running


def command(folder: Path, line: str) -> list[str]:
    """A command line; FILE.png is in the folder."""
    return [str(folder / part) if part.endswith(".png") else part for part in line.split()]


LINES = {
    "remove": "remove --click 20,20 --seed 3",
    "move": "move --click 20,20 --to 50,4,90,40 --steps 1 --seed 3",
    "move-with-strength": "move --click 20,20 --to 50,4,90,40 --steps 4 --strength 0.5 --seed 3",
    "reshape-finely": "reshape --object-mask cup.png --to tall.png --steps 2 --refine 900 --seed 3",
    "swap-places-with-strength": "swap --click 20,20 --other-click 70,30 --steps 2 --strength 0.5 --seed 3",
    "reshape": "reshape --object-mask cup.png --to tall.png --steps 1 --seed 3",
    "swap": "swap --object-box 8,8,40,40 --reference vase.png --steps 1 --seed 3",
    "swap-shape": "swap --click 20,20 --reference vase.png --mode shape --steps 1 --seed 3",
    "swap-finely": "swap --click 20,20 --reference vase.png --steps 2 --refine 900 --edge hard --seed 3",
    "swap-places": "swap --click 20,20 --other-click 70,30 --steps 1 --seed 3",
    "try-on": "try-on --object-mask cup.png --reference shelf.png --reference-click 70,30 --steps 1 --seed 3",
}


@pytest.mark.parametrize("name", LINES)
def test_every_edit_here_and_on_a_server(
    folder: Path, here: list[str], server: ServerThread, name: str, capsys: Capture
) -> None:
    drawn = []
    for flags in (here, ["--server", server.address]):
        line = command(folder, f"{LINES[name]} --scene shelf.png --quiet -o out.png")
        assert main([*line, *flags]) == 0
        said = capsys.readouterr()
        assert said.out == f"{folder / 'out.png'} (seed 3)\n"
        assert ("anydoor: filled by: guess" in said.err) == (name != "try-on")
        drawn.append(np.asarray(Image.open(folder / "out.png")))
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1
    assert (drawn[0] != SHELF).any(axis=2)[hole_of(CUP)].any()


@pytest.mark.parametrize("filler", ["stable_diffusion", "imprint"])
def test_a_filler(folder: Path, here: list[str], filler: str, capsys: Capture) -> None:
    bundle = tiny_imprint_bundle() if filler == "imprint" else tiny_stable_diffusion_bundle(9)
    line = command(folder, "remove --scene shelf.png --click 20,20 --fill-steps 2 --seed 3 -o out.png")
    assert main([*line, *here, "--filler", str(bundle)]) == 0
    assert f"anydoor: filled by: {filler}\n" in capsys.readouterr().err
    changed = (np.asarray(Image.open(folder / "out.png")) != SHELF).any(axis=2)
    assert changed[CUP].mean() > 0.9
    assert not changed[~hole_of(CUP)].any()
    assert (
        main([*line, *here, "--filler", str(bundle), "--fill-prompt", "a desk"]) == (filler == "imprint") * 2
    )


REFUSALS = [
    ("remove --click 200,20", "the click 200,20 lies outside the scene, which has 96 x 48 pixels"),
    ("remove --click here", "'here' is not a click: two whole numbers x,y are expected"),
    ("remove --click !20,20", "no click is on the object: give at least one that is"),
    ("remove --object-mask nothing.png", "the mask is empty"),
    ("remove --object-mask all.png", "the hole covers the whole picture, so nothing is left"),
    ("remove --object-mask vase.png", "they must have the same size"),
    ("remove --click 20,20 --steps 3", "nothing is drawn when an object is removed"),
    ("remove --click 20,20 --fill-prompt desk", "no model that fills holes is loaded: leave this out"),
    ("move --click 20,20 --to 200,4,240,40", "lies outside the scene of 96 x 48 pixels"),
    ("move --click 20,20 --to 9,9,9,20", "has no area"),
    ("reshape --click 20,20 --to vase.png", "they must have the same size"),
    ("reshape --click 20,20 --to none.png", "No such file or directory"),
    ("move --click 20,20 --to 50,4,90,40 --strength 0", "strength must be a number above 0, at most 1"),
    ("reshape --click 20,20 --to tall.png --refine 1000", "refine must be a timestep from 1 to 999"),
    ("swap --click 20,20 --other-click 22,24", "both selections are the same object"),
    ("swap --click 20,20", "give one other object: with --reference, or in the scene"),
    (
        "swap --click 20,20 --other-click 70,30 --reference vase.png",
        "give one other object: with --reference",
    ),
    ("try-on --click 20,20 --reference shelf.png", "the reference has no transparency"),
    ("swap --click 20,20 --other-click 70,30 --mode shape", "--mode is for an object with a --reference"),
    ("try-on --click 20,20", "nothing to place: give a --reference or a --prompt"),
    ("try-on --click 20,20 --reference-click 3,3 --reference vase.png", "needs a --reference before it"),
    ("swap --click 20,20 --reference vase.png --reference shelf.png", "2 pictures of an object are given"),
    ("swap --click 20,20 --prompt vase", "takes no prompt"),
    ("swap --click 20,20 --reference vase.png --refine 1000", "refine must be a timestep from 1 to 999"),
    (
        "try-on --click 20,20 --object-box 1,2,9,9 --reference vase.png",
        "give only one of box, mask and clicks",
    ),
]


@pytest.mark.parametrize(("line", "sentence"), REFUSALS, ids=[line for line, _ in REFUSALS])
def test_refusals(folder: Path, here: list[str], line: str, sentence: str, capsys: Capture) -> None:
    given = [*command(folder, f"{line} --scene shelf.png --quiet -o out.png"), *here]
    if "here" in line:  # what is no click is a matter of the command line
        with pytest.raises(SystemExit, match="2"):
            main(given)
    else:
        assert main(given) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert len([text for text in error.splitlines() if text.startswith("anydoor: ") or "error:" in text]) == 1
    assert not (folder / "out.png").exists()


def test_any_picture_of_an_edit_may_come_from_standard_input(
    folder: Path, here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    line = "swap --scene {} --object-mask {} --reference {} --steps 1 --seed 3 --quiet -o out.png"
    files = ("shelf.png", "cup.png", "vase.png")
    drawn = set()
    for index, name in enumerate(files):
        stdin = SimpleNamespace(buffer=io.BytesIO((folder / name).read_bytes()))
        monkeypatch.setattr("sys.stdin", stdin)
        given = [*files[:index], "-", *files[index + 1 :]]
        assert main([*command(folder, line.format(*given)), *here]) == 0
        drawn.add((folder / "out.png").read_bytes())
    assert len(drawn) == 1
    assert main([*command(folder, line.format("-", "-", "vase.png")), *here]) == 2
    assert "standard input holds one picture, but several are -" in capsys.readouterr().err


def test_nothing_is_found(folder: Path, here: list[str], capsys: Capture) -> None:
    """By a network in a dark picture, and by the rule in one that is not plain."""
    Image.fromarray(np.full((48, 96, 3), 10, np.uint8)).save(folder / "dark.png")
    noise = np.random.default_rng(0).integers(0, 256, (48, 96, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    line = "remove --scene {}.png --quiet -o out.png"
    assert main([*command(folder, line.format("dark")), *here]) == 2
    assert "no object was found in the scene: give a mask, or other clicks" in capsys.readouterr().err
    assert main([*command(folder, line.format("noise")), *here[:2]]) == 2
    assert "the background of the scene is not plain" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "action", "status", "sentence"),
    [
        (
            Where(clicks=[(200, 20)]),
            Remove(),
            "INVALID_ARGUMENT",
            "where.clicks: the click 200,20 lies outside",
        ),
        (Where(mask=np.zeros_like(CUP)), Remove(), "INVALID_ARGUMENT", "where.mask: the mask is empty"),
        (Where(mask=np.ones_like(CUP)), Remove(), "INVALID_ARGUMENT", "where: the hole covers the whole"),
        (
            Where(clicks=[(20, 20)]),
            SwapPlaces(Where(clicks=[(22, 24)])),
            "INVALID_ARGUMENT",
            "other: both selections are the same object",
        ),
        (Where(clicks=[(20, 20)]), Move((200, 4, 240, 40)), "INVALID_ARGUMENT", "to: the box"),
    ],
)
def test_statuses(server: ServerThread, where: Where, action: Action, status: str, sentence: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        error = refusal(stub.Edit, message_from_edit(Edit(SHELF, where, action)))
    assert error.code().name == status
    assert sentence in error.details()
    assert "\n" not in error.details()


def test_what_is_not_loaded_is_a_failed_precondition(tiny_bundle: Path) -> None:
    asked = {
        "--segmenter BUNDLE": Edit(SHELF, Where(clicks=[(20, 20)]), Remove()),
        "--filler BUNDLE": Edit(SHELF, Where(mask=CUP), Remove()),
    }
    with ServerThread(tiny_bundle) as server, grpc.insecure_channel(server.address) as channel:
        stub = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        for option, edit in asked.items():
            message = message_from_edit(edit)
            message.fill.CopyFrom(pb.Fill(prompt="a desk" * ("filler" in option)))
            error = refusal(stub.Edit, message)
            assert error.code().name == "FAILED_PRECONDITION"
            assert option in error.details()

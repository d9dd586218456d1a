"""Segmentation networks with the inputs and outputs of each known family become bundles."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import AnyDoorError
from engines.options import EngineOptions
from export.build_engines import main
from export.segmenters.building import SegmenterSource
from export.segmenters.recognition import NORMALISATIONS
from runtime.imaging.masks import MASK_THRESHOLD
from runtime.segmentation import Segmenter
from tests.support.segmenters import (
    CELLS,
    HALF,
    IMAGENET,
    SIDE,
    SIGNED,
    Network,
    efficient_sam,
    salient,
    sam,
    sam2,
    u2net,
)

EXAMPLES = Path(__file__).parents[2] / "examples"

MAIN_OBJECT = {
    "U2Net": u2net,
    "IS-Net": lambda folder: salient(folder / "isnet.onnx", HALF, 1024, others=1),
    "BiRefNet": lambda folder: salient(
        folder / "birefnet.onnx", IMAGENET, 1024, ("input_image", "output_image"), sigmoid=False
    ),
    "MODNet": lambda folder: salient(folder / "modnet.onnx", SIGNED, "height"),
}

CLICKED = {"SAM": sam, "SAM 2": sam2, "EfficientSAM": efficient_sam}


def build(*paths: Path, output: Path, options: tuple[str, ...] = ()) -> Bundle:
    arguments = [*map(str, paths), "--output", str(output), "--backend", "onnxruntime", "--quiet", *options]
    assert main(arguments) == 0
    return Bundle.open(output)


@pytest.mark.parametrize("family", MAIN_OBJECT)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_network_of_the_main_object(family: str, backend: str, tmp_path: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    bundle = build(MAIN_OBJECT[family](tmp_path), output=tmp_path / "bundle")
    side = bundle.manifest.resolution
    picture = np.full((1, 3, side, side), 0.3, np.float32)
    picture[:, :, : side // 2, : side // 2] = 0.9
    engine = open_engine(bundle, EngineOptions(backend=backend, device="cpu", threads=1))
    mask = engine.to_host(engine.run("salient", {"picture": picture})["mask"])
    inside = np.zeros((side, side), bool)
    inside[: side // 2, : side // 2] = True
    np.testing.assert_array_equal(mask[0, 0] > 0.5, inside)
    assert str(bundle.manifest.architecture["wrap"]).startswith(f"{family}: stretched to {side} x {side}")


def test_a_network_in_half_precision(tmp_path: Path) -> None:
    """Its rounding may differ more than that of others; public files of IS-Net are like that."""
    network = salient(tmp_path / "isnet.onnx", HALF, 1024, others=1, half=True)
    bundle = build(network, output=tmp_path / "bundle")
    assert bundle.manifest.precision == "fp16"
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[10:30, 20:50] = 255
    found = Segmenter.load(bundle.path, options=EngineOptions("onnxruntime", "cpu")).mask(picture)
    assert found[12:28, 22:48].all()
    assert not found[:8].any()
    assert not found[:, :18].any()


@pytest.mark.parametrize("family", CLICKED)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_networks_of_clicks(family: str, backend: str, tmp_path: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    encoder, decoder = CLICKED[family](tmp_path)
    bundle = build(decoder, encoder, output=tmp_path / "bundle")  # in any order
    picture = np.zeros((1, 3, SIDE, SIDE), np.float32)
    picture[:, :, :, : SIDE // 2] = 0.75
    engine = open_engine(bundle, EngineOptions(backend=backend, device="cpu", threads=1))
    given = {"picture": picture}
    if family == "SAM":
        given["inside"] = np.ones((1, 1, SIDE, SIDE), np.float32)
    features = engine.run("embed", given)
    for count in (1, 2):
        points = np.full((1, count, 2), SIDE / 4, np.float32)
        labels = np.ones((1, count), np.float32)
        found = engine.run("click", {**features, "points": points, "labels": labels})
        masks, scores = (engine.to_host(found[name]) for name in ("masks", "scores"))
        assert scores.argmax() == 1
        columns = np.arange(CELLS) < CELLS // 2
        np.testing.assert_array_equal(masks[0, 1] > 0, np.broadcast_to(columns, (CELLS, CELLS)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_padding_of_sam_has_the_mean_colour(channels_last: bool, tmp_path: Path) -> None:
    bundle = build(*sam(tmp_path, channels_last), output=tmp_path / "bundle")
    inside = np.ones((1, 1, SIDE, SIDE), np.float32)
    inside[:, :, SIDE // 2 :] = 0
    engine = open_engine(bundle, EngineOptions(backend="onnxruntime", device="cpu", threads=1))
    picture = np.full((1, 3, SIDE, SIDE), 0.75, np.float32)
    found = engine.to_host(engine.run("embed", {"picture": picture, "inside": inside})["features_0"])
    np.testing.assert_allclose(found[0, 0, : CELLS // 2], 0.75, atol=1e-6)
    np.testing.assert_allclose(found[0, 0, CELLS // 2 :], np.mean(IMAGENET[0]), atol=1e-6)


def test_the_command_says_what_was_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from runtime.cli import main as anydoor

    build(u2net(tmp_path), output=tmp_path / "bundle")
    printed = capsys.readouterr().out
    wrap = "U2Net: stretched to 320 x 320, divided by its largest value, mean 0.485 0.456 0.406, deviation"
    assert wrap in printed
    assert "system: segmenter, fp32, 320 px" in printed
    assert anydoor(["doctor", str(tmp_path / "bundle"), "--backend", "onnxruntime"]) == 0
    printed = capsys.readouterr().out
    assert f"wrap: {wrap}" in printed
    assert "sound; largest error against the network" in printed


def test_what_sizes_do_not_say_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = salient(tmp_path / "rmbg.onnx", HALF, 1024)
    assert main([str(network), "--quiet"]) == 2
    assert "say --normalise imagenet (BiRefNet, RMBG-2.0), half" in capsys.readouterr().err
    bundle = build(network, output=tmp_path / "bundle", options=("--normalise", "half"))
    assert bundle.manifest.architecture["wrap"] == (
        "main object: stretched to 1024 x 1024, mean 0.5 0.5 0.5, deviation 1 1 1"
    )


@pytest.mark.parametrize(
    ("normalise", "side"), [("u2net", 320), ("signed", 512), ("half", 1024), ("imagenet", 1024)]
)
def test_a_variable_size_becomes_that_of_the_networks_with_the_normalisation(
    normalise: str, side: int, tmp_path: Path
) -> None:
    network = salient(tmp_path / "any.onnx", HALF, "height")
    (wrap,) = SegmenterSource.open([network], normalise).wraps
    assert wrap.size == side


def no_picture(folder: Path) -> list[Path]:
    network = Network()
    network.add("Neg", "tokens", to="more")
    return [network.save(folder / "text.onnx", [("tokens", (1, 77))], [("more", (1, 77))])]


def strangers(folder: Path) -> list[Path]:
    return [u2net(folder), sam(folder)[1]]


def gives(
    shape: Sequence[int], side: int = 320, declared: Sequence[int | str] | None = None
) -> Callable[[Path], list[Path]]:
    """A network of U2Net's or MODNet's inputs, whose output is a constant of some shape."""

    def make(folder: Path) -> list[Path]:
        network = Network()
        zero = network.add("Mul", network.add("ReduceMean", "x", keepdims=0), network.constant(0))
        network.add("Add", zero, network.constant(np.zeros(shape)), to="y")
        outputs = [("y", shape if declared is None else declared)]
        return [network.save(folder / "any.onnx", [("x", (1, 3, side, side))], outputs)]

    return make


def wide(folder: Path) -> list[Path]:
    network = Network()
    network.add("ReduceMean", "x", axes=[1], to="y")
    return [network.save(folder / "wide.onnx", [("x", (1, 3, 320, 512))], [("y", (1, 1, 320, 512))])]


def empty(folder: Path) -> list[Path]:
    (folder / "empty.onnx").touch()
    return [folder / "empty.onnx"]


def no_input(folder: Path) -> list[Path]:
    network = Network()
    network.add("Neg", network.constant((1.0,)), to="y")
    return [network.save(folder / "constant.onnx", [], [("y", (1,))])]


def no_scores(folder: Path) -> list[Path]:
    files = sam(folder)
    model = onnx.load(files[1])
    del model.graph.output[1:]
    onnx.save(model, files[1])
    return [*files]


def damaged(folder: Path) -> list[Path]:
    (folder / "cut.onnx").write_bytes(u2net(folder).read_bytes()[:-100])
    return [folder / "cut.onnx"]


@pytest.mark.parametrize(
    ("files", "refusal"),
    [
        (no_picture, "takes 'tokens' (1, 77): pictures are (1, 3, S, S)"),
        (lambda folder: [sam(folder)[1]], "comes in two files, its encoder and its decoder; give both"),
        (strangers, "are not a known encoder and decoder"),
        (damaged, "cannot read the network"),
        (empty, "empty.onnx': there is none in it"),
        (no_input, "takes nothing: a network that finds objects takes a picture"),
        (no_scores, "gives 'masks' alone: known decoders give masks and their scores"),
        (wide, "takes 'x' (1, 3, 320, 512): pictures are (1, 3, S, S)"),
        (gives((1,), 100_000), "takes pictures of 100000 px, and at most 8192 are possible"),
        (gives((1, 1000)), "gives 'y' (1, 1000): a network that finds the main object gives a mask (1, 1,"),
        (gives((1, 1, 80, 80)), "gives 'y' (1, 1, 80, 80): a network that finds the main object"),
        (gives((1, 2, 512, 512), 512), "gives 'y' (1, 2, 512, 512): a network that finds the main object"),
        (lambda folder: [folder / "none.onnx"], "No such file"),
    ],
)
def test_what_is_no_known_network_is_refused(
    files: Callable[[Path], list[Path]], refusal: str, tmp_path: Path
) -> None:
    with pytest.raises(AnyDoorError) as caught:
        SegmenterSource.open(files(tmp_path))
    assert refusal in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "declared", "refusal"),
    [
        ((), (), "gives 'y' (), which is no mask"),
        ((1, 1000), ("n", "c"), "gives 'y' (1, 1000): a network that finds the main object gives"),
        ((1, 2, 320, 320), (1, "c", 320, 320), "gives 'y' (1, 2, 320, 320): a network that finds"),
    ],
)
def test_outputs_that_are_no_masks_when_the_network_runs(
    shape: Sequence[int],
    declared: Sequence[int | str],
    refusal: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file need not say the sizes of its outputs."""
    (network,) = gives(shape, declared=declared)(tmp_path)
    assert (
        main([str(network), "--output", str(tmp_path / "bundle"), "--backend", "onnxruntime", "--quiet"]) == 2
    )
    assert refusal in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_scores_that_are_not_one_per_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder, decoder = sam(tmp_path)
    model = onnx.load(decoder)
    names = [output.name for output in model.graph.output]
    del model.graph.output[names.index("iou_predictions")]  # another output takes its place
    onnx.save(model, decoder)
    output = ["--output", str(tmp_path / "bundle"), "--backend", "onnxruntime", "--quiet"]
    assert main([str(encoder), str(decoder), *output]) == 2
    assert "known ones give masks (1, K, s, s) and scores (1, K)" in capsys.readouterr().err


def test_a_network_whose_name_cannot_be_shown(tmp_path: Path) -> None:
    network = u2net(tmp_path).rename(tmp_path / "u2\u00a0net.onnx")
    assert build(network, output=tmp_path / "bundle").manifest.checkpoint["file"] == "u2?net.onnx"


def test_a_network_is_not_replaced_by_its_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = build(u2net(tmp_path), output=tmp_path / "bundle").path
    graph = bundle / "salient.onnx"
    assert main([str(graph), "--output", str(bundle), "--quiet"]) == 2
    assert f"'{graph}', which is built from, lies in '{bundle}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["u2net.onnx", "--targets", "nonsense"], "--targets of onnxruntime is any or cuda"),
        (["u2net.onnx", "--targets", "cuda"], "--targets cuda goes with a checkpoint"),
        (["u2net.onnx", "--deterministic"], "--deterministic goes with a checkpoint"),
        (["u2net.onnx", "--resolution", "512"], "--resolution goes with a checkpoint"),
        (["model.ckpt", "decoder.onnx"], "'decoder.onnx' is for segmentation networks"),
        (["model.ckpt", "--normalise", "half"], "--normalise is for segmentation networks"),
    ],
)
def test_flags_of_others_are_refused(
    options: list[str], refusal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "--backend", "onnxruntime"]) == 2
    assert refusal in capsys.readouterr().err


def test_every_normalisation_can_be_named() -> None:
    from export.segmenters import command

    assert set(command.NORMALISATIONS) == set(NORMALISATIONS)


NAMED = os.environ.get("ANYDOOR_SEGMENTER", "")


@pytest.mark.skipif(not NAMED, reason="ANYDOOR_SEGMENTER names no ONNX file of IS-Net or the like")
def test_a_real_network_finds_the_example_in_an_empty_room(tmp_path: Path) -> None:
    """ANYDOOR_SEGMENTER=isnet-general-use.onnx python -m pytest tests/export/test_segmenters.py -k real

    An IS-Net in FP16 reached an intersection over union of 0.99.
    """
    cut = Image.open(EXAMPLES / "object.png").convert("RGBA").resize((300, 300))
    between_the_things = (125, 0, 275, 300)
    room = Image.open(EXAMPLES / "scene.png").convert("RGB").resize((640, 640), box=between_the_things)
    room.paste(cut, (170, 200), cut)
    expected = np.zeros((640, 640), np.bool_)
    expected[200:500, 170:470] = np.asarray(cut)[..., 3] > MASK_THRESHOLD
    bundle = build(Path(NAMED), output=tmp_path / "bundle")
    found = Segmenter.load(bundle.path, options=EngineOptions("onnxruntime", "cpu")).mask(np.asarray(room))
    assert (found & expected).sum() / (found | expected).sum() > 0.9

"""A bundle for several views of an object, from its build command to a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.bundle import Bundle
from export.build_engines import main as build
from runtime.cli import main
from tests.support.serving import ServerThread, object_array, scene_array
from tests.support.stable_diffusion import folder as stable_diffusion_folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    Image.fromarray(scene_array()).save(tmp_path / "scene.png")
    for number, name in enumerate(("front", "side", "back")):
        Image.fromarray(object_array(number + 1)).save(tmp_path / f"{name}.png")
    return tmp_path


def composite(folder: Path, *names: str, where: list[str]) -> np.ndarray:
    references = [part for name in names for part in ("--reference", str(folder / f"{name}.png"))]
    common = ["--scene", str(folder / "scene.png"), "--box", "10,8,60,50", "--steps", "2", "--seed", "7"]
    output = folder / "out.png"
    assert main(["composite", *references, *common, *where, "--quiet", "-o", str(output)]) == 0
    return np.asarray(Image.open(output))


@pytest.mark.nightly
def test_from_the_build_to_a_picture(tiny_checkpoint: Path, tiny_bundle: Path, pictures: Path) -> None:
    path = pictures / "several"
    common = ["--output", str(path), "--resolution", "64", "--backend", "onnxruntime", "--quiet"]
    assert build([str(tiny_checkpoint), "--references", "2", *common]) == 0
    specs, ones = (Bundle.open(bundle).manifest.specs for bundle in (path, tiny_bundle))
    for graph in ("control", "denoise"):
        counts = [spec[graph].tensor("tokens").shape[1] for spec in (specs, ones)]
        assert counts[0] == 2 * counts[1]
    assert specs["id_encoder"] == ones["id_encoder"]

    here = ["--bundle", str(path)]
    two = composite(pictures, "front", "side", where=here)
    one, alone = (
        composite(pictures, "front", where=["--bundle", str(bundle)]) for bundle in (path, tiny_bundle)
    )
    assert (two != one).any()
    assert np.abs(one.astype(int) - alone).max() <= 1
    with ServerThread(path) as server:
        there = composite(pictures, "front", "side", where=["--server", server.address])
        with server.client() as client:
            assert client.model_info().views == 2
    assert np.abs(two.astype(int) - there).max() <= 1


def test_two_references_for_one_place_need_such_a_bundle(
    tiny_bundle: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = [
        part for name in ("front", "side") for part in ("--reference", str(pictures / f"{name}.png"))
    ]
    command = ["composite", *references, "--scene", str(pictures / "scene.png"), "--box", "10,8,60,50"]
    assert main([*command, "--bundle", str(tiny_bundle), "-o", str(pictures / "out.png")]) == 2
    assert "2 pictures of an object are given, but this bundle takes 1: build one with --references 2" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--references", "0"], "--references must be at least 1, not 0"),
        (["--references", "2"], "--references is not for Stable Diffusion, which takes"),
    ],
)
def test_refusals(
    options: list[str], refusal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = stable_diffusion_folder(tmp_path / "sd")
    assert build([str(source), *options, "--output", str(tmp_path / "bundle")]) == 2
    assert refusal in capsys.readouterr().err

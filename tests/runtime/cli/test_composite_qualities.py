"""The qualities and their parameters as options of `anydoor composite`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.options import EngineOptions
from runtime import Compositor, Request, Sampling
from runtime.cli import main
from runtime.diffusion.presets import QUALITIES
from tests.support.pictures import PLACEMENT, SCENE, Pixels, cutout


@pytest.fixture(scope="module")
def compositor(tiny_bundle: Path) -> Compositor:
    return Compositor.load(tiny_bundle, EngineOptions(backend="onnxruntime", device="cpu"))


def drawn(compositor: Compositor, sampling: Sampling) -> Pixels:
    (result,) = compositor.run(Request(SCENE, [PLACEMENT], 7, sampling))
    return result.image


def composite(folder: Path, bundle: Path, *more: str) -> Pixels:
    Image.fromarray(SCENE).save(folder / "scene.png")
    Image.fromarray(cutout()).save(folder / "object.png")
    files = ["--scene", str(folder / "scene.png"), "--reference", str(folder / "object.png")]
    assert PLACEMENT.box is not None
    place = ["--box", ",".join(map(str, PLACEMENT.box)), "--seed", "7"]
    output = ["--output", str(folder / "out.png"), "--quiet", "--device", "cpu", "--backend", "onnxruntime"]
    assert main(["composite", *files, *place, *output, "--bundle", str(bundle), *more]) == 0
    return np.asarray(Image.open(folder / "out.png"))


@pytest.mark.parametrize("quality", QUALITIES)
def test_command_line(tmp_path: Path, tiny_bundle: Path, compositor: Compositor, quality: str) -> None:
    given = composite(tmp_path, tiny_bundle, "--quality", quality, "--steps", "5")
    expected = drawn(compositor, Sampling(**{**QUALITIES[quality], "steps": 5}))
    np.testing.assert_array_equal(given, expected)


def test_every_parameter_is_an_option(tmp_path: Path, tiny_bundle: Path, compositor: Compositor) -> None:
    options = "--sampler dpm_solver_2m --steps 5 --guidance-interval 200,800 --map-steps 2 --guidance-scale 3"
    given = composite(tmp_path, tiny_bundle, *options.split())
    sampling = Sampling(
        steps=5, guidance_scale=3.0, sampler="dpm_solver_2m", guidance_interval=(200, 800), map_steps=2
    )
    np.testing.assert_array_equal(given, drawn(compositor, sampling))


def test_an_interval_that_is_not_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["composite", "--reference", "a", "--scene", "b", "-o", "c.png", "--guidance-interval", "9"])
    assert caught.value.code == 2
    assert "'9' is not an interval: two timesteps first,last are expected" in capsys.readouterr().err

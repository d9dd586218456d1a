"""Defaults with which a bundle would be of no use are refused before it is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.errors import AnyDoorError
from export.build_engines import main
from export.defaults import check_build_defaults


@pytest.mark.parametrize("system", ["anydoor", "imprint", "stable_diffusion"])
def test_the_systems_own_are_fine(system: str) -> None:
    check_build_defaults(system, {})
    check_build_defaults(system, {"steps": 20, "timesteps": [1, 5, 999], "mode": "shape"})


@pytest.mark.parametrize(
    ("default", "sentence"),
    [
        ({"steps": "abc"}, "steps must be a whole number from 1 to 999, not 'abc'"),
        ({"guidance_interval": [5]}, "guidance_interval must be a lower and a higher timestep, not 5"),
        ({"timesteps": [1, 5, 5000]}, "timesteps must be a whole number from 0 to 999, not 5000"),
        ({"timesteps": 5}, "timesteps must be a list of whole numbers"),
        ({"timesteps": [5, 1]}, "timesteps must rise strictly"),
        ({"timesteps": []}, "timesteps must rise strictly"),
        ({"mode": "inside"}, "there is no mode 'inside'"),
        ({"edge": "sharp"}, "there is no edge 'sharp'"),
        ({"strength": 0}, "strength must be above 0"),
        ({"refine": 1000}, "refine must be a whole number from 0 to 999, not 1000"),
        ({"mask_level": 9}, "there is no mask level 9"),
        ({"crop_ratio": 0.5}, "the crop ratio is 0.5; expected 1 to 100"),
    ],
)
def test_what_every_picture_would_be_refused_for(default: dict[str, object], sentence: str) -> None:
    with pytest.raises(
        AnyDoorError, match="the bundle would refuse every picture, by its defaults: "
    ) as error:
        check_build_defaults("anydoor", default)
    assert sentence in str(error.value)


def test_systems_that_live_elsewhere_check_their_own() -> None:
    check_build_defaults("toy", {"steps": "abc"})


def test_nothing_is_exported(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_checkpoint), "--output", str(tmp_path / "bundle"), "--default", "steps=abc"]
    assert main([*command, "--resolution", "64", "--quiet"]) == 2
    assert "steps must be a whole number from 1 to 999, not 'abc'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

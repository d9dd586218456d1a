"""The UNet that may leave out its deep part is the UNet, where it does not; and what the command refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.seeded import TINY, seeded_tensor
from benchmarks.studies import feature_reuse
from benchmarks.studies.feature_reuse import ReusingUNet, main, parser
from engines.bundle import sha256
from training.network.architecture import Prediction
from training.network.modules import AnyDoor

RESOLUTION = 64

Capture = pytest.CaptureFixture[str]


def seeded_model(prediction: Prediction = "epsilon", attention: tuple[bool, bool] = (True, False)) -> AnyDoor:
    model = AnyDoor(replace(TINY, prediction=prediction, unet_attention=attention), ["unet"]).eval()
    tensors = {k: torch.from_numpy(seeded_tensor(k, v, 0)) for k, v in model.official_shapes().items()}
    model.load_official_state_dict(tensors)
    return model


def inputs(model: AnyDoor, timestep: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Latents, timestep, ID tokens and detail maps of two rows; all but the last follow from the timestep."""
    a = model.architecture
    generator = torch.Generator().manual_seed(timestep)
    side = RESOLUTION // a.latent_factor

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    details = [draw(*shape) for shape in a.detail_shapes(RESOLUTION)]
    tokens = draw(a.token_count, a.token_width)
    return draw(a.latent_channels, side, side), torch.full((2,), float(timestep)), tokens, details


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("attention", [(True, False), (False, True)])
@torch.no_grad()
def test_a_full_step_is_that_of_the_network(prediction: Prediction, attention: tuple[bool, bool]) -> None:
    model = seeded_model(prediction, attention)
    reusing = ReusingUNet(model)
    for timestep in (1, 501, 981):
        given = inputs(model, timestep)
        expected = model.predict_noise(*given)
        assert float(expected.std()) > 0.1
        torch.testing.assert_close(reusing.predict_noise(*given, shallow=False), expected)


@torch.no_grad()
def test_a_shallow_step_has_the_deep_features_of_the_last_full_one() -> None:
    """With the same inputs it is that step again; with others it is neither that step nor their full one."""
    model = seeded_model()
    reusing = ReusingUNet(model)
    before, given = inputs(model, 501), inputs(model, 481)
    full = reusing.predict_noise(*before, shallow=False)
    torch.testing.assert_close(reusing.predict_noise(*before, shallow=True), full)
    shallow = reusing.predict_noise(*given, shallow=True)
    for other in (full, model.predict_noise(*given)):
        assert float((shallow - other).abs().max()) > 1e-2


def test_the_command_says_what_it_measured(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(feature_reuse, "TARGET_STEPS", 4)
    monkeypatch.setattr(
        feature_reuse, "SAMPLERS_AND_STEPS", (("ddim", 3, (1, 2)), ("dpm_solver_2m", 2, (1,)))
    )
    output = tmp_path / "new" / "reuse.json"
    arguments = ["--checkpoint", str(tiny_checkpoint), "--resolution", "64", "--count", "1"]
    assert main([*arguments, "--output", str(output)]) == 0
    content: dict[str, Any] = json.loads(output.read_text())
    assert content["command"].startswith("python benchmarks/studies/feature_reuse.py --checkpoint ")
    assert content["command"].endswith(f"--resolution 64 --count 1 --output {output}")
    assert content["checkpoint"] == {"file": tiny_checkpoint.name, "sha256": sha256(tiny_checkpoint)}
    assert content["machine"]["processor"]
    assert 0 < content["shallow_share"]["this"] < 1
    rows = {(row["sampler"], row["steps"], row["every"]): row for row in content["rows"]}
    assert rows.keys() == {("ddim", 3, 1), ("ddim", 3, 2), ("dpm_solver_2m", 2, 1)}
    assert rows["ddim", 3, 1]["operations"] == pytest.approx(3 / 50)
    assert rows["ddim", 3, 2]["operations"] == pytest.approx((2 + content["shallow_share"]["this"]) / 50)
    assert all(row["distance"] > 0 for row in rows.values())
    assert str(output) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--count", "0"], "--count must be at least 1, not 0"),
        (["--count", "-3"], "--count must be at least 1, not -3"),
        (["--resolution", "50"], "--resolution must be a multiple of 16 for this network, not 50"),
        (["--checkpoint", "none"], "there is no checkpoint at 'none'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Capture, options: list[str], sentence: str
) -> None:
    output = tmp_path / "reuse.json"
    assert main(["--checkpoint", str(tiny_checkpoint), "--output", str(output), *options]) == 2
    assert capsys.readouterr().err == f"feature_reuse.py: {sentence}\n"
    assert not output.exists()


def test_help_has_examples() -> None:
    assert "python benchmarks/studies/feature_reuse.py --count 2" in parser().format_help()

"""How far off the example model's expectations are, by region; and what the command refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.studies.latent_errors import REGIONS, TIMESTEPS, Errors, LinearFunction, main, prepare
from benchmarks.support.example import CHECKPOINT
from benchmarks.support.truth_set import truth_pairs
from training.assemble import network_in
from training.data.synthetic.views import HELD_OUT
from training.network.checkpoint import read_checkpoint, write_checkpoint
from training.network.modules import AnyDoor


def test_errors_are_means_over_the_cells_of_a_region() -> None:
    errors = Errors()
    cells = {name: torch.zeros(2, 2, dtype=torch.bool) for name in REGIONS}
    cells["object"][0] = True
    for off in (1.0, 3.0):
        errors.add("row", torch.full((4, 2, 2), off), torch.zeros(4, 2, 2), cells)
    assert errors.means("row") == {"object": 5.0, "background in the box": None, "outside": None}


def test_the_linear_function_is_found() -> None:
    torch.manual_seed(0)
    inputs, weights = torch.randn(5000, 6) * 3 + 1, torch.randn(6, 2)
    function = LinearFunction(inputs, inputs @ weights + 2)
    others = torch.randn(7, 6)
    assert torch.allclose(function(others), others @ weights + 2, atol=0.1)


def test_the_regions_of_a_pair_are_the_whole_picture(example_checkpoint: Path) -> None:
    model = network_in(str(example_checkpoint)).eval()
    assert isinstance(model, AnyDoor)
    with torch.no_grad():
        prepared = prepare(model, next(truth_pairs(1)), 96)
    regions = torch.stack(list(prepared.regions.values()))
    assert torch.equal(regions.sum(0), torch.ones(12, 12, dtype=torch.int64))
    assert all(region.any() for region in regions)
    # what is emptied is in the box
    emptied = prepared.baselines["empty box, background guessed"]
    off = (emptied - prepared.truth).square().mean(0)
    assert off[prepared.regions["outside"]].mean() < off[prepared.regions["object"]].mean() / 10


def test_less_noise_leaves_less_to_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "errors.json"
    assert main(["--count", "2", "--fit", "3", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert results["settings"] == {"count": 2, "first": HELD_OUT, "fit": 3, "same": False}
    rows = {row.pop("row"): row for row in results["rows"]}
    errors = [rows[f"{CHECKPOINT}, t = {timestep}"]["object"] for timestep in TIMESTEPS]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < rows["nothing: zeros"]["object"]
    assert rows["linear function"]["outside"] is None
    assert f"{errors[0]:.3f}" in capsys.readouterr().out


def test_objects_of_a_training_can_be_measured(tmp_path: Path) -> None:
    assert (
        main(["--first", "0", "--count", "1", "--fit", "1", "--output", str(tmp_path / "errors.json")]) == 0
    )


def test_nothing_is_left_to_guess_when_the_reference_is_the_picture(
    example_checkpoint: Path, tmp_path: Path
) -> None:
    outputs = {name: tmp_path / f"{name}.json" for name in ("other", "same")}
    for name, options in (("other", []), ("same", ["--same"])):
        assert main(["--count", "2", "--fit", "0", "--output", str(outputs[name]), *options]) == 0
    rows = {
        name: {row["row"]: row["object"] for row in json.loads(output.read_text())["rows"]}
        for name, output in outputs.items()
    }
    pasted = "copy-paste, background guessed"
    assert rows["same"][pasted] < rows["other"][pasted] / 10
    noise_alone = f"{example_checkpoint}, t = 999"
    assert rows["same"][noise_alone] < rows["other"][noise_alone]


def test_networks_for_pictures_of_other_sizes_are_measured_apart(
    example_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = read_checkpoint(example_checkpoint)
    write_checkpoint(
        tmp_path / "larger.safetensors", dict(example.tensors), example.architecture, resolution=256
    )
    checkpoints = [f"--checkpoint={path}" for path in (example_checkpoint, tmp_path / "larger.safetensors")]
    command = [*checkpoints, "--count", "1", "--fit", "0", "--output", str(tmp_path / "errors.json")]
    assert main(command) == 2
    sentence = f"the networks draw [{example.resolution}, 256] pixels: measure them apart"
    assert sentence in capsys.readouterr().err
    assert main([*command, "--resolution", "64"]) == 0


def test_networks_with_another_autoencoder_are_measured_apart(
    example_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = read_checkpoint(example_checkpoint)
    name = "first_stage_model.quant_conv.bias"
    tensors = dict(example.tensors) | {name: example.tensors[name] + 1}
    write_checkpoint(
        tmp_path / "other.safetensors", tensors, example.architecture, resolution=example.resolution
    )
    checkpoints = [f"--checkpoint={path}" for path in (example_checkpoint, tmp_path / "other.safetensors")]
    assert main([*checkpoints, "--count", "1", "--fit", "0", "--output", str(tmp_path / "errors.json")]) == 2
    assert "other.safetensors' has another autoencoder than the first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--count", "0"], "--count is at least 1"),
        (["--resolution", "100"], "--resolution must be a multiple of"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors"),
        (["--checkpoint", "examples/imprint-small.safetensors.index.json"], "is not an AnyDoor checkpoint"),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "errors.json")]) == 2
    assert reason in capsys.readouterr().err

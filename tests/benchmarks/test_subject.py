"""Measures of a subject: a row per checkpoint, the paper's ablations, the scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from benchmarks.subject import main, read_prompts
from benchmarks.support.embeddings import Embeddings
from benchmarks.support.feature_distance import AutoencoderDistance
from benchmarks.support.lpips import load_lpips
from benchmarks.support.subject import Drawn, Judges
from benchmarks.support.subject_runs import ABLATIONS, compare, named, summarise, without_identifier
from tests.training.systems.test_dreambooth import save_pictures
from tests.training.test_train_dreambooth import recipe
from training.config import DreamBoothRecipe, read_recipe
from training.data.pairs import Picture

Capture = pytest.CaptureFixture[str]


def plain(*greys: int) -> list[Picture]:
    return [np.full((64, 64, 3), grey, np.uint8) for grey in greys]


def stripes(period: int) -> Picture:
    columns = np.arange(64) // period % 2 * 255
    return np.broadcast_to(columns[None, :, None], (64, 64, 3)).astype(np.uint8)


def brightness(pictures: Sequence[Picture]) -> Embeddings:
    """An embedding whose cosines are known: (dark, bright), of unit length."""
    angles = [picture.mean() / 255 * np.pi / 2 for picture in pictures]
    return np.array([[np.cos(angle), np.sin(angle)] for angle in angles])


def test_a_row_per_checkpoint_and_a_sheet(tmp_path: Path, capsys: Capture) -> None:
    path = recipe(tmp_path)
    output, runs = tmp_path / "results", tmp_path / "runs"
    how = ["--count", "2", "--steps", "2", "--output", str(output), "--runs", str(runs)]
    assert main([str(path), "--train", "--every", *how]) == 0
    assert "step-00002" in capsys.readouterr().out
    rows = json.loads((output / "subject.json").read_text())["rows"]
    assert [(row["variant"], row["checkpoint"]) for row in rows] == [
        ("cat", "step-00001"),
        ("cat", "step-00002"),
    ]
    assert rows[0]["mean"].keys() == {
        "identity",
        "PRES by identity",
        "DIV by autoencoder",
        "DIV by identity",
    }
    assert rows[0]["mean"] != rows[1]["mean"]
    # three rows, of which the longest has three pictures, for each of two checkpoints
    assert Image.open(output / "subject.png").size == (6 * 32, 2 * (3 * 32 + 16))


@pytest.mark.slow
def test_ablations_of_subjects_that_take_the_place_of_the_recipes(tmp_path: Path) -> None:
    path = recipe(tmp_path, steps=1)
    for name in ("0-cat", "1-cat", "2-mat"):
        (tmp_path / "objects").mkdir(exist_ok=True)
        save_pictures(tmp_path / "objects" / name, (40, 40))
    how = ["--count", "1", "--steps", "1", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
    objects = ["--objects", str(tmp_path / "objects"), "--subjects", "1"]
    assert main([str(path), "--train", "--ablations", *ABLATIONS, "--wrong", "car", *objects, *how]) == 0
    rows = json.loads((tmp_path / "subject.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["cat", "cat-no-prior", "cat-wrong-noun", "cat-no-noun"]
    assert all(row["subjects"] == [row["mean"]] for row in rows)
    assert {"recognised", "class recognised"} < rows[0]["mean"].keys()
    assert not list((tmp_path / "runs").glob("cat-no-prior-*/prior"))
    assert len(list((tmp_path / "runs" / "cat-wrong-noun-0-cat" / "prior").glob("*.png"))) == 2


def test_settings_of_the_recipe_are_changed(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    how = ["--count", "1", "--steps", "1", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
    assert main([str(path), "--train", "--every", "--set", "subject.steps=1", *how]) == 0
    results = json.loads((tmp_path / "subject.json").read_text())
    assert [row["checkpoint"] for row in results["rows"]] == ["step-00001"]
    assert results["settings"]["changes"] == ["subject.steps=1"]


def test_prompts_name_the_subject_or_its_parts_as_the_papers_do(tmp_path: Path) -> None:
    """CLIP-T takes them without the identifier."""
    path, read = tmp_path / "prompts.txt", read_recipe(recipe(tmp_path))
    assert isinstance(read, DreamBoothRecipe)
    subject = read.subject
    path.write_text(
        "{} in the jungle\n\n'a {0} {1} in the snow'.format(unique_token, class_token),\n\"a red {0} {1}\"\n"
    )
    prompts = read_prompts(path)
    assert prompts == ["{} in the jungle", "a {0} {1} in the snow", "a red {0} {1}"]
    assert [named(prompt, subject) for prompt in prompts] == [
        "a mat cat in the jungle",
        "a mat cat in the snow",
        "a red mat cat",
    ]
    assert [without_identifier(prompt, subject) for prompt in prompts] == [
        "a cat in the jungle",
        "a cat in the snow",
        "a red cat",
    ]
    assert named(prompts[1], replace(subject, noun=False)) == "a mat in the snow"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--every"], "there is no model.safetensors in"),
        (["--prompts", "prompts.txt"], "every line is a prompt with {}"),
        (["--dino", "nowhere"], "is not a DINO folder"),
        (["--lpips", "."], "lacks alexnet*.pth"),
        (["--objects", "start"], "does not end with -CLASS"),
        (["--count", "0"], "at least 1"),
        (["--steps", "1000"], "--steps is 1000; at most 999 can be taken"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    arguments: list[str],
    sentence: str,
) -> None:
    path = recipe(tmp_path)
    (tmp_path / "prompts.txt").write_text("in the snow\n")
    monkeypatch.chdir(tmp_path)
    assert main([str(path), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_row_is_the_mean_over_its_subjects() -> None:
    assert summarise([{"DINO": 0.5, "PRES": 0.0}, {"DINO": 0.7, "PRES": 1.0}]) == {"DINO": 0.6, "PRES": 0.5}


def test_an_ablation_is_compared_subject_by_subject() -> None:
    with_prior, without = [{"DIV": 0.5}, {"DIV": 0.9}], [{"DIV": 0.4}, {"DIV": 0.6}]
    # differences of -0.1 and -0.3: a standard deviation of 0.2 / sqrt(2), over sqrt(2)
    expected = {"DIV": {"mean": pytest.approx(-0.2), "standard_error": pytest.approx(0.1)}}
    assert compare(without, with_prior) == expected


def test_scores_are_the_papers() -> None:
    """Likeness to the subject, its class's likeness to it, and likeness to prompts without its name."""
    drawn = Drawn(
        real=plain(0),
        subject={"a hmv cup": plain(0, 255)},
        of_class=plain(255),
        said={"a hmv cup": "a cup"},
    )

    def dark(prompts: Sequence[str]) -> Embeddings:
        assert prompts == ["a cup"]
        return np.array([[1.0, 0.0]])

    scores = Judges(dino=brightness, clip=brightness, clip_text=dark).score(drawn)
    assert scores["DINO"] == scores["CLIP-I"] == scores["CLIP-T"] == pytest.approx(0.5)
    assert scores["PRES"] == pytest.approx(0, abs=1e-9)


def test_the_descriptor_tells_copies_from_other_pictures() -> None:
    across = np.swapaxes(stripes(8), 0, 1)
    drawn = Drawn([stripes(8)], {"": [stripes(8), stripes(8)]}, [across], {"": ""})
    scores = Judges().score(drawn)
    assert scores["identity"] == pytest.approx(1)
    assert scores["DIV by identity"] == pytest.approx(0, abs=1e-9)
    assert scores["PRES by identity"] < 0.7


def test_lpips_is_the_published_formula(tmp_path: Path) -> None:
    """Against AlexNet as torchvision builds it, with random weights."""
    torch.manual_seed(0)
    widths = (3, 64, 192, 384, 256, 256)
    kernels = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
    layers: list[nn.Module] = []
    for inputs, outputs, (side, stride, padding) in zip(widths, widths[1:], kernels):
        layers += [nn.Conv2d(inputs, outputs, side, stride, padding), nn.ReLU()]
        if outputs in (64, 192):
            layers.append(nn.MaxPool2d(3, 2))
    alexnet = nn.Sequential(*layers)
    linear = {f"lin{n}.model.1.weight": torch.rand(1, width, 1, 1) for n, width in enumerate(widths[1:])}
    torch.save({f"features.{n}": w for n, w in alexnet.state_dict().items()}, tmp_path / "alexnet.pth")
    torch.save(linear, tmp_path / "alex.pth")

    pictures = [stripes(8), stripes(3)]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected, features = 0.0, []
    with torch.no_grad():
        for picture in pictures:
            hidden = ((torch.tensor(picture.copy()) / 127.5 - 1 - shift) / scale).permute(2, 0, 1)[None]
            found = []
            for layer in alexnet:
                hidden = layer(hidden)
                if isinstance(layer, nn.ReLU):
                    found.append(hidden / hidden.square().sum(1, keepdim=True).sqrt().add(1e-10))
            features.append(found)
        for (first, second), weight in zip(zip(*features), linear.values(), strict=True):
            expected += float((weight * (first - second) ** 2).sum(1).mean())
    assert load_lpips(tmp_path).diversity(pictures, side=64) == pytest.approx(expected, rel=1e-5)
    assert load_lpips(tmp_path).diversity([pictures[0]] * 3, side=64) == 0


def test_the_autoencoder_compares_directions_of_features_at_the_same_place() -> None:
    """Against the mean over pairs, levels and positions of 2 (1 - cosine), written out."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    pictures = [stripes(8), stripes(3), plain(90)[0]]
    levels: list[list[torch.Tensor]] = [[], []]
    for number, block in enumerate(autoencoder.encoder.down_blocks):
        block.register_forward_hook(lambda _, __, output, number=number: levels[number].append(output))
    found = AutoencoderDistance(autoencoder).diversity(pictures)
    pairs = [(0, 1), (0, 2), (1, 2)]
    distances = [
        2 - 2 * torch.cosine_similarity(level[a], level[b]).mean().item()
        for level in levels
        for a, b in pairs
    ]
    assert found == pytest.approx(np.mean(distances), rel=1e-4)
    assert AutoencoderDistance(autoencoder).diversity([pictures[0]] * 3) == 0

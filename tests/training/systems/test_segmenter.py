"""The small segmenter: exact masks, a network of any side, and the way from a recipe to a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from export.build_engines import main as build
from runtime import Segmenter
from training.config import SegmenterRecipe, read_recipe
from training.data.cut_outs import CutOutRules, CutOuts, before_backdrop
from training.data.synthetic.views import VIEW_SIZE
from training.data.view_store import ViewStore, draw_views
from training.inspect_data import main as inspect
from training.network.segmenter import Segmenter as Network
from training.network.segmenter import SegmenterArchitecture, overlap
from training.systems.segmenter import SegmenterTask
from training.train import main as train

RECIPE = Path("training/recipes/segmenter-small.toml")
SMALL = SegmenterArchitecture(side=32, channels=(8, 16), norm_groups=4)


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "views"
    draw_views(folder, 2)
    return folder


def short(folder: Path) -> Path:
    """The recipe, two steps long, for two objects and a small network."""
    settings = {"objects": "2", "steps": "2", "batch": "2", "save_every": "1", "warmup": "1"}
    settings |= {"side": "32", "channels": "[8, 16]"}
    lines = []
    for line in RECIPE.read_text("utf-8").splitlines():
        name = line.partition(" = ")[0]
        lines.append(f"{name} = {settings[name]}" if name in settings else line)
    path = folder / "small.toml"
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_an_object_before_a_backdrop_keeps_its_pixels_and_its_mask(views: Path) -> None:
    view = ViewStore(views).reference(0, 0)
    for seed in range(8):
        made = before_backdrop(view, CutOutRules(), np.random.default_rng(seed))
        inside = made.mask == 255
        assert np.count_nonzero(inside) == np.count_nonzero(view.mask == 255)
        np.testing.assert_array_equal(made.image[inside], view.image[view.mask == 255])
        assert min(made.mask.shape) >= VIEW_SIZE


def test_pictures_follow_from_their_numbers_and_show_all_of_the_object(views: Path) -> None:
    samples = CutOuts(ViewStore(views), 32, CutOutRules(backdrops=0.5), seed=0)
    first, again, other = samples[0], samples[0], samples[1]
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        assert (values.dtype, values.shape[1:]) == (np.float32, (32, 32))
    assert (first["picture"] != other["picture"]).any()
    for number in range(12):
        sample = samples[number]
        assert -1 <= sample["picture"].min() <= sample["picture"].max() <= 1
        assert 0.01 < sample["mask"].mean() < 0.9


def test_overlap_is_intersection_over_union() -> None:
    mask, truth = torch.zeros(2, 2, 1, 4, 4).unbind(0)
    mask[0, :, :2], truth[0, :, 1:3] = 1, 1
    torch.testing.assert_close(overlap(mask, truth), torch.tensor([1 / 3, 1.0]))


def test_it_learns_a_picture(views: Path) -> None:
    task = SegmenterTask(SMALL, CutOuts(ViewStore(views), 32, CutOutRules(), seed=0))
    batch = {name: torch.from_numpy(values)[None] for name, values in task.dataset()[0].items()}
    optimizer = torch.optim.Adam(task.module.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        losses = task.loss(task.module, batch)
        losses["loss"].backward()
        optimizer.step()
    assert float(losses["overlap"]) > 0.9


def test_its_size_is_the_recipe_s() -> None:
    recipe = read_recipe(RECIPE)
    assert isinstance(recipe, SegmenterRecipe)
    network = Network(recipe.architecture)
    assert sum(weight.numel() for weight in network.parameters()) * 4 < 5e6
    side = recipe.architecture.side
    assert network(torch.zeros(1, 3, side, side)).shape == (1, 1, side, side)


def test_from_a_recipe_to_a_bundle(tmp_path: Path, views: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run = str(short(tmp_path)), views.parent
    assert train([recipe, "--folder", str(run)]) == 0
    assert "data: 2 rendered objects, samples made anew for every step" in capsys.readouterr().out
    bundle = tmp_path / "bundle"
    network = str(run / "segmenter-small.onnx")
    assert build([network, "--normalise", "signed", "--backend", "onnxruntime", "--output", str(bundle)]) == 0
    segmenter = Segmenter.load(bundle)
    assert segmenter.finds_main_object
    assert "stretched to 32 x 32, mean 0.5 0.5 0.5" in capsys.readouterr().out

    assert inspect([recipe, str(tmp_path / "sheet.png"), "--folder", str(run), "--count", "2"]) == 0
    assert train([recipe, "--folder", str(run), "--start", "model.safetensors"]) == 2
    assert "a segmenter goes on from what its folder has alone" in capsys.readouterr().err

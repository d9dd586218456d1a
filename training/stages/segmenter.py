"""Defines the stages of a small segmenter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from engines.spec import GraphSpec, TensorSpec
from training import seeds
from training.assemble import stage_weights
from training.config import SegmenterRecipe
from training.data.cut_outs import CutOuts
from training.data.view_store import ViewStore, draw_views
from training.loop import on_main_process, train
from training.network.segmenter import Segmenter
from training.systems.segmenter import SegmenterTask
from training.workers import drawer_count, drawing_device

ONNX = "segmenter-small.onnx"
"""What `write_network` writes: see docs/edits.md for the command that makes a bundle of it."""


@on_main_process
def draw_objects(recipe: SegmenterRecipe, folder: Path) -> None:
    """Draws the objects of the recipe."""
    workers = max(drawer_count(recipe.data.workers), 1)
    draw_views(recipe.data.objects_in(folder / "views"), recipe.data.objects, workers, drawing_device())


def segmentation_samples(recipe: SegmenterRecipe, folder: Path) -> CutOuts:
    """Opens what the network learns from.

    Raises:
        StoreError: no objects are drawn.
    """
    return CutOuts(
        ViewStore(recipe.data.objects_in(folder / "views")),
        recipe.architecture.side,
        recipe.pictures,
        seeds.CUT_OUTS,
    )


def train_segmentation(recipe: SegmenterRecipe, folder: Path) -> None:
    """Trains the network."""
    task = SegmenterTask(recipe.architecture, segmentation_samples(recipe, folder))
    train(task, recipe.segmentation, folder / "segmentation")


@on_main_process
def write_network(recipe: SegmenterRecipe, folder: Path) -> None:
    """Writes the network as ONNX: picture (1, 3, S, S), normalised to -1..1 -> logits (1, 1, S, S)."""
    from export.onnx_graph import export_onnx

    network = Segmenter(recipe.architecture)
    with stage_weights(folder / "segmentation") as weights:
        network.load_state_dict(weights)
    side = recipe.architecture.side
    spec = GraphSpec(
        "segmenter",
        "segment",
        (TensorSpec("picture", "float32", (1, 3, side, side)),),
        (TensorSpec("logits", "float32", (1, 1, side, side)),),
    )
    export_onnx(network.eval(), spec, folder / ONNX)


STAGES: Mapping[str, Callable[[SegmenterRecipe, Path], None]] = {
    "views": draw_objects,
    "segmentation": train_segmentation,
    "checkpoint": write_network,
}
"""In their order."""

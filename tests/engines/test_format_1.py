"""Version 1 of the bundle: the example bundle with the manifest that it had then draws the same pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import format_1
from engines.bundle import Bundle
from engines.errors import BundleError
from engines.manifest import MANIFEST, read_manifest
from engines.options import EngineOptions
from runtime import Compositor, Placement, Request, Sampling
from runtime.systems.anydoor import DEFAULTS
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ENCODE, GRAPHS, ID_ENCODER
from tests.support.pictures import SCENE, cutout

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "anydoor-small"
OLD_MANIFEST = ROOT / "tests" / "data" / "manifest-1.json"

PLACEMENT = Placement(
    cutout(),
    box=(30, 20, 80, 70),
    mode="crop",
    reference_ratio=1.3,
    box_ratio=1.2,
    crop_ratio=1.9,
)
SAMPLING = Sampling(
    steps=3,
    guidance_scale=3.5,
    control_scale=0.8,
    eta=0.0,
    sampler="ddim",
    guidance_interval=(0, 999),
    map_steps=3,
)
"""With nothing left open."""


@pytest.fixture(scope="module")
def old_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example bundle as it was in version 1."""
    # copies: both libraries refuse weights that are links to another folder
    folder = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("version-1") / "bundle")
    shutil.copyfile(OLD_MANIFEST, folder / MANIFEST)
    return folder


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads(OLD_MANIFEST.read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))
    return folder / MANIFEST


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        Sampling(**{**vars(SAMPLING), "sampler": "dpm_solver_2m", "guidance_interval": (200, 900)}),
        Sampling(**{**vars(SAMPLING), "eta": 1.0, "guidance_scale": 1.0}),
    ],
)
def test_the_pictures_are_the_same(old_bundle: Path, backend: str, sampling: Sampling) -> None:
    pytest.importorskip(backend)
    # a bundle of format 1 has no default for the edge
    request = Request(SCENE, [replace(PLACEMENT, edge="hard")], 7, sampling, num_images=2)
    old, new = (
        Compositor.load(bundle, EngineOptions(backend=backend, device="cpu")).run(request)
        for bundle in (old_bundle, EXAMPLE)
    )
    for found, expected in zip(old, new):
        assert (found.seed, found.regions) == (expected.seed, expected.regions)
        np.testing.assert_array_equal(found.image, expected.image)
    assert not np.array_equal(old[0].image, SCENE)


def test_it_says_the_same_as_version_2(old_bundle: Path) -> None:
    old, new = Bundle.open(old_bundle).manifest, Bundle.open(EXAMPLE).manifest
    assert {*old.specs} == {*new.specs} - {ENCODE}
    assert all(new.specs[name] == spec for name, spec in old.specs.items())
    assert old.dimensions == new.dimensions
    assert (old.backend, old.backend_version, old.target) == (new.backend, new.backend_version, new.target)
    assert (old.system, old.precision, old.max_batch) == (new.system, new.precision, new.max_batch)
    assert old.checkpoint["file"] == new.checkpoint["file"]
    assert (old.architecture, old.schedule) == (new.architecture, new.schedule)
    assert old.constants == new.constants
    for name, record in old.graphs.items():
        assert record.files == new.graphs[name].files
        assert record.error == new.graphs[name].error


def test_roles_banks_and_feedback_follow_from_the_names(old_bundle: Path) -> None:
    manifest = Bundle.open(old_bundle).manifest
    roles = {name: spec.role for name, spec in manifest.specs.items()}
    assert roles == {ID_ENCODER: "condition", CONTROL: "window", DENOISE: "step", DECODE: "decode"}
    tokens, maps = manifest.step.banks
    assert (tokens.name, tokens.tensors, tokens.index) == ("tokens", ("tokens",), "row_condition")
    assert (maps.name, maps.index) == ("detail_maps", "row_map")
    assert maps.tensors == tuple(tensor.name for tensor in manifest.specs[CONTROL].outputs)
    assert manifest.step.feedback == {"latent": "next_latent", "carry": "epsilon"}
    assert manifest.latent_shape == (12, 12, 12)
    assert manifest.resolution == 96


def test_inputs_have_their_present_names_and_are_stored_under_the_old_ones(old_bundle: Path) -> None:
    step = Bundle.open(old_bundle).manifest.step
    stored = {tensor.name: tensor.stored_name for tensor in step.tensors}
    renamed = {name: stored_name for name, stored_name in stored.items() if name != stored_name}
    assert renamed == {"carry": "noise", "guidance_scale": "guidance", "control_scale": "strength"}
    assert {"carry", "guidance_scale", "control_scale"} <= stored.keys()
    assert set(step.per_step) < stored.keys()


def test_it_has_no_defaults(old_bundle: Path) -> None:
    compositor = Compositor.load(old_bundle, EngineOptions(device="cpu"))
    assert compositor.bundle.manifest.defaults == {}
    without_encoder = DEFAULTS.keys() - {"refine", "strength"}
    assert compositor.defaults == {name: DEFAULTS[name] for name in without_encoder}


def test_memory_is_planned_with_the_estimate_of_version_1(old_bundle: Path) -> None:
    content = json.loads(OLD_MANIFEST.read_text())
    for name, record in Bundle.open(old_bundle).manifest.graphs.items():
        assert record.scratch_bytes == {
            "onnxruntime": format_1.host_scratch(content, fused_attention=False)[name],
            "openvino": format_1.host_scratch(content, fused_attention=True)[name],
        }
        assert record.scratch_bytes["onnxruntime"] >= record.scratch_bytes["openvino"] > 0


def test_plans_keep_the_scratch_memory_that_their_builder_named(tmp_path: Path) -> None:
    def plans(content: dict[str, Any]) -> None:
        for number, graph in enumerate(content["graphs"].values()):
            graph.update(backend="tensorrt_rtx", target="sm86,sm89", scratch_bytes=1000 + number)

    manifest = read_manifest(edited(tmp_path, plans))
    assert (manifest.backend, manifest.target) == ("tensorrt_rtx", "sm86,sm89")
    scratch = [record.scratch_bytes for record in manifest.graphs.values()]
    assert scratch == [{"tensorrt_rtx": 1000 + number} for number in range(4)]


@pytest.mark.parametrize("key", ["graphs", "constants", "max_batch", "precision", "model", "architecture"])
def test_something_is_missing(tmp_path: Path, key: str) -> None:
    with pytest.raises(BundleError, match=f"cannot be used.*'{key}'.*rebuild"):
        read_manifest(edited(tmp_path, lambda content: content.pop(key)))


@pytest.mark.parametrize("graph", [graph for graph in GRAPHS if graph != ENCODE])
def test_a_graph_is_missing(tmp_path: Path, graph: str) -> None:
    with pytest.raises(BundleError, match=f"cannot be used .'graphs.{graph}' is missing.; rebuild"):
        read_manifest(edited(tmp_path, lambda content: content["graphs"].pop(graph)))


def test_graphs_of_several_backends(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda content: content["graphs"][DECODE].update(backend="tensorrt"))
    with pytest.raises(BundleError, match="its graphs are for several backends: onnxruntime, tensorrt"):
        read_manifest(path)

"""Version 1 of the bundle: what its builder wrote draws the pictures that a bundle of today draws."""

from __future__ import annotations

import json
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
from tests.support.format_1 import OLD_BUNDLE, bundle_of_the_same_checkpoint
from tests.support.pictures import SCENE, cutout

OLD_MANIFEST = OLD_BUNDLE / MANIFEST

PLACEMENT = Placement(
    cutout(),
    box=(30, 20, 80, 70),
    mode="crop",
    reference_ratio=1.3,
    box_ratio=1.2,
    crop_ratio=1.9,
    edge="hard",
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
def old_bundle() -> Path:
    """What the builder of version 1 made."""
    return OLD_BUNDLE


@pytest.fixture(scope="module")
def new_bundle() -> Path:
    """What today's builder makes of the same checkpoint."""
    return bundle_of_the_same_checkpoint()


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
def test_the_pictures_are_the_same(
    old_bundle: Path, new_bundle: Path, backend: str, sampling: Sampling
) -> None:
    """Up to the rounding to 8 bits: the builders write some operators in different ways."""
    pytest.importorskip(backend)
    request = Request(SCENE, [PLACEMENT], 7, sampling, num_images=2)
    old, new = (
        Compositor.load(bundle, EngineOptions(backend=backend, device="cpu")).run(request)
        for bundle in (old_bundle, new_bundle)
    )
    for found, expected in zip(old, new):
        assert (found.seed, found.regions) == (expected.seed, expected.regions)
        assert np.abs(found.image.astype(int) - expected.image).max() <= 1
    assert not np.array_equal(old[0].image, SCENE)


def test_it_says_the_same_as_version_2(old_bundle: Path, new_bundle: Path) -> None:
    old, new = Bundle.open(old_bundle).manifest, Bundle.open(new_bundle).manifest
    assert {*old.specs} == {*new.specs} - {ENCODE}
    for name, spec in old.specs.items():
        inputs = tuple(replace(tensor, file_name="") for tensor in spec.inputs)
        assert replace(spec, inputs=inputs) == new.specs[name]
    assert old.dimensions == new.dimensions
    assert (old.backend, old.target) == (new.backend, new.target)
    assert (old.system, old.precision, old.max_batch) == (new.system, new.precision, new.max_batch)
    assert old.checkpoint["file"] == new.checkpoint["file"]
    assert (old.architecture, old.schedule) == (new.architecture, new.schedule)
    assert old.constants.path == new.constants.path


def test_what_was_recorded_of_the_build_is_kept(old_bundle: Path) -> None:
    manifest, content = Bundle.open(old_bundle).manifest, json.loads(OLD_MANIFEST.read_text())
    assert manifest.checkpoint == content["checkpoint"]
    assert vars(manifest.constants) == content["constants"]
    for name, record in manifest.graphs.items():
        recorded = content["graphs"][name]
        assert [vars(file) for file in record.files] == recorded["files"]
        assert (record.error, record.build_seconds) == (recorded["error"], recorded["build_seconds"])
        assert manifest.backend_version == recorded["backend_version"]


def test_it_can_be_written_in_version_2(old_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(old_bundle).manifest
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    assert json.loads((tmp_path / MANIFEST).read_text())["format_version"] == 2
    assert read_manifest(tmp_path / MANIFEST) == manifest


def test_roles_banks_and_feedback_follow_from_the_names(old_bundle: Path) -> None:
    manifest = Bundle.open(old_bundle).manifest
    roles = {name: spec.role for name, spec in manifest.specs.items()}
    assert roles == {ID_ENCODER: "condition", CONTROL: "window", DENOISE: "step", DECODE: "decode"}
    tokens, maps = manifest.step.banks
    assert (tokens.name, tokens.tensors, tokens.index) == ("tokens", ("tokens",), "row_condition")
    assert (maps.name, maps.index) == ("detail_maps", "row_map")
    assert maps.tensors == tuple(tensor.name for tensor in manifest.specs[CONTROL].outputs)
    assert manifest.step.feedback == {"latent": "next_latent", "carry": "epsilon"}
    assert manifest.latent_shape == (4, 8, 8)
    assert manifest.resolution == 64


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

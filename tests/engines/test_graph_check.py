"""Bundles whose manifest says something else than their graphs: refused in a sentence when loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import AnyDoorError, BackendError, BundleError
from engines.manifest import MANIFEST
from engines.options import EngineOptions
from export.example_inputs import example_inputs
from runtime import Compositor
from tests.support.anydoor import DECODE, DENOISE, ID_ENCODER

Json = dict[str, Any]

BACKENDS = ["onnxruntime", "openvino"]


def changed(bundle: Path, folder: Path, change: Callable[[Json], object]) -> Path:
    """A copy of a bundle with another manifest."""
    copy = Path(shutil.copytree(bundle, folder / "bundle"))
    content = json.loads((copy / MANIFEST).read_text("utf-8"))
    change(content)
    (copy / MANIFEST).write_text(json.dumps(content), "utf-8")
    return copy


def tensor(content: Json, graph: str, kind: str, name: str) -> Json:
    found: Json = next(each for each in content["graphs"][graph][kind] if each["name"] == name)
    return found


CHANGES: dict[str, tuple[str, Callable[[Json], object], str]] = {
    "another name in the file": (
        ID_ENCODER,
        lambda content: tensor(content, ID_ENCODER, "outputs", "tokens").update(file_name="no_such"),
        "it has no output 'no_such'",
    ),
    "another input": (
        DECODE,
        lambda content: content["graphs"][DECODE]["inputs"].append(
            {"name": "strength", "dtype": "float32", "shape": [1]}
        ),
        "it has no input 'strength'",
    ),
    "an input left out": (
        ID_ENCODER,
        lambda content: content["graphs"][ID_ENCODER]["inputs"].clear(),
        "it needs the input 'reference'",
    ),
    "another dtype": (
        DECODE,
        lambda content: tensor(content, DECODE, "outputs", "decoded").update(dtype="float16"),
        "the output 'decoded' is float32 .* and the manifest says float16",
    ),
    "another size": (
        ID_ENCODER,
        lambda content: tensor(content, ID_ENCODER, "inputs", "reference").update(
            shape=["samples", 3, 28, 224]
        ),
        r"the input 'reference' is float32 \[\?, 3, .* says float32 \['samples', 3, 28, 224\]",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_graph_that_is_another_is_refused(
    tiny_bundle: Path, tmp_path: Path, name: str, backend: str
) -> None:
    pytest.importorskip(backend)
    graph, change, says = CHANGES[name]
    engine = open_engine(
        Bundle.open(changed(tiny_bundle, tmp_path, change)), EngineOptions(backend, device="cpu")
    )
    with pytest.raises(BundleError, match=f"the graph '{graph}' is not what the manifest says: {says}"):
        engine.load(graph)


def widen(content: Json) -> None:
    tensor(content, DECODE, "outputs", "image")["shape"][3] = 1


def shrink(content: Json) -> None:
    tensor(content, DENOISE, "outputs", "next_latent")["shape"][1] = 1


def forget(content: Json) -> None:
    content["graphs"][DENOISE]["per_step"].remove("timestep")


def forget_banks(content: Json) -> None:
    content["graphs"][DENOISE]["banks"] = []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (widen, "the picture does not have three channels of 8 bits"),
        (shrink, "'next_latent' does not have the shape of the latent"),
        (forget, "nothing gives the input 'timestep' of 'denoise'"),
        (forget_banks, "nothing gives the input 'tokens' of 'denoise'"),
        (lambda content: content["graphs"][DENOISE].update(build_seconds=10**400), "a number"),
        (
            lambda content: content["graphs"].update({"../x": content["graphs"][DECODE]}),
            "at most 100 letters",
        ),
        (lambda content: content["constants"].update(bytes=200 << 30), "has .* bytes instead of"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_at_once(
    tiny_bundle: Path, tmp_path: Path, change: Callable[[Json], object], says: str
) -> None:
    with pytest.raises(BundleError, match=says):
        Bundle.open(changed(tiny_bundle, tmp_path, change))


def test_a_bundle_of_another_system_than_it_says(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = changed(tiny_bundle, tmp_path, lambda content: content.update(system="imprint"))
    with pytest.raises(AnyDoorError, match="has no bank 'scene'"):
        Compositor.load(bundle)


def test_a_small_file_is_small(tiny_bundle: Path, tmp_path: Path) -> None:
    """One of 200 GB that takes no room on the disk would fill the memory."""
    copy = changed(tiny_bundle, tmp_path, lambda content: content["constants"].update(bytes=200 << 30))
    with (copy / "constants.npz").open("r+b") as file:
        file.truncate(200 << 30)
    with pytest.raises(BundleError, match="has more than 64 MiB"):
        Bundle.open(copy).constants()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_does_not_run_is_a_sentence(tiny_bundle: Path, backend: str) -> None:
    pytest.importorskip(backend)
    bundle = Bundle.open(tiny_bundle)
    engine = open_engine(bundle, EngineOptions(backend, device="cpu"))
    inputs = example_inputs(bundle.manifest.specs[DENOISE], bundle.manifest.typical_sizes)
    inputs["latent"] = np.zeros((1, 9, 8, 8), np.float32)
    with pytest.raises(BackendError, match="could not run the graph 'denoise'"):
        engine.run(DENOISE, inputs)

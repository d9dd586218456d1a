"""Bundles: what is damaged, foreign or of another time is refused with a sentence that says what to do."""

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
from engines.errors import BackendError, BundleError
from engines.manifest import MANIFEST
from engines.options import EngineOptions
from tests.support.anydoor import CONTROL, DENOISE, GRAPHS, ID_ENCODER

Content = dict[str, Any]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a bundle, to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit_manifest(bundle: Path, change: Callable[[Content], object]) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    change(content)
    (bundle / MANIFEST).write_text(json.dumps(content))


def test_sound_bundle_opens_and_verifies(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert set(bundle.manifest.graphs) == set(GRAPHS)
    for graph in GRAPHS:
        bundle.verify(graph)
    constants = bundle.constants()
    tokens = bundle.manifest.specs[ID_ENCODER].tensor("tokens")
    assert constants["unconditional_tokens"].shape == tokens.resolve({"samples": 1}) == (1, 257, 32)
    assert constants["alphas_cumprod"].shape == (1000,)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle at .*anydoor build CHECKPOINT"):
        Bundle.open(tmp_path / "none")


def test_directory_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"it has no manifest\.json"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\x00\xff"])
def test_manifest_that_is_not_one(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match=r"not valid JSON|is not a bundle"):
        Bundle.open(tmp_path)


def test_manifest_of_a_newer_version(bundle: Path) -> None:
    edit_manifest(bundle, lambda content: content.update(format_version=3))
    with pytest.raises(BundleError, match="format version 3 and this runtime reads up to 2: upgrade"):
        Bundle.open(bundle)


@pytest.mark.parametrize("key", ["system", "graphs", "constants", "dimensions", "max_batch", "precision"])
def test_manifest_with_something_missing(bundle: Path, key: str) -> None:
    edit_manifest(bundle, lambda content: content.pop(key))
    with pytest.raises(BundleError, match=f"cannot be used.*'{key}'.*rebuild"):
        Bundle.open(bundle)


def test_manifest_that_points_outside(bundle: Path) -> None:
    edit_manifest(bundle, lambda content: content["constants"].update(path="../constants.npz"))
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(bundle)


def test_missing_file(bundle: Path) -> None:
    (bundle / "denoise.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"denoise.onnx.data is missing; copy it again or rebuild"):
        Bundle.open(bundle)


def test_cut_short_file(bundle: Path) -> None:
    path = bundle / "control.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"control.onnx.data has \d+ bytes instead of \d+"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["denoise.onnx", "denoise.onnx.data"])
def test_flipped_bit_is_found_before_the_graph_runs(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    engine = open_engine(Bundle.open(bundle), EngineOptions(device="cpu"))
    engine.load(CONTROL)
    with pytest.raises(BundleError, match=f"{name} is not the file that was built"):
        engine.load(DENOISE)


def test_flipped_bit_in_the_constants(bundle: Path) -> None:
    content = bytearray((bundle / "constants.npz").read_bytes())
    content[100] ^= 1
    (bundle / "constants.npz").write_bytes(content)
    with pytest.raises(BundleError, match="its hash differs"):
        Bundle.open(bundle).constants()


def test_bundle_for_an_unknown_backend(bundle: Path) -> None:
    edit_manifest(bundle, lambda content: content.update(backend="abacus"))
    with pytest.raises(BundleError, match="is for abacus"):
        open_engine(Bundle.open(bundle))


def test_device_that_the_installed_library_lacks(tiny_bundle: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has a CUDA provider")
    with pytest.raises(BackendError, match=r"no cuda provider; .*pip install '\.\[cpu\]'.*'\.\[cuda\]'"):
        open_engine(Bundle.open(tiny_bundle), EngineOptions(device="cuda"))


def test_constants_are_the_tokens_of_a_black_picture(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    engine = open_engine(bundle, EngineOptions(backend="onnxruntime", device="cpu"))
    black = np.zeros((1, 3, 224, 224), np.float32)
    tokens = engine.to_host(engine.run(ID_ENCODER, {"reference": black})["tokens"])
    # another version of ONNX Runtime rounds otherwise than the one that computed them
    np.testing.assert_allclose(bundle.constants()["unconditional_tokens"], tokens, atol=1e-5)

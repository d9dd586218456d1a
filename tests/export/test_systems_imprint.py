"""IMPRINT's bundles: what they say, what they compute, and what a build refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import AnyDoorError
from engines.memory_plan import card_memory, fixed_buffers, place_name
from engines.options import EngineOptions
from export.options import SourceOptions
from export.systems import open_source
from export.systems.imprint import DENOISE, ID_ENCODER, ImprintSource, graph_specs
from export.verification import relative_error
from tests.support.imprint import (
    imprint_file,
    object_stitch_compositor,
    object_stitch_file,
    object_stitch_tensors,
    tiny_imprint,
    tiny_imprint_bundle,
)
from training.network.imprint import ImprintArchitecture


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(tiny_imprint_bundle())


def test_the_bundle_says_what_it_is(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert (manifest.system, manifest.picture_size, manifest.latent_shape) == ("imprint", (64, 64), (4, 8, 8))
    roles = {name: spec.role for name, spec in manifest.specs.items()}
    assert roles == {"id_encoder": "condition", "denoise": "step", "encode": "scene", "decode": "decode"}
    assert [bank.tensors for bank in manifest.step.banks] == [("tokens",), ("background", "blend", "scene")]
    assert not bundle.constants()["unconditional_tokens"].any()


@torch.no_grad()
def test_tokens_are_those_of_dinov2_and_adapter(bundle: Bundle) -> None:
    reference = np.random.default_rng(0).random((2, 3, 224, 224), np.float32)
    engine = open_engine(bundle, EngineOptions("onnxruntime", "cpu", threads=1))
    found = engine.to_host(engine.run(ID_ENCODER, {"reference": reference})["tokens"])
    expected = tiny_imprint().encode_reference(torch.from_numpy(reference)).numpy()
    assert found.shape == (2, 257, 32)
    assert relative_error(found, expected) < 1e-4


def test_no_reference_is_the_vector_of_object_stitch(tmp_path: Path) -> None:
    bundle = object_stitch_compositor(tmp_path).bundle
    assert bundle.manifest.size_text == "96x64 px"
    tokens = bundle.constants()["unconditional_tokens"]
    vector = object_stitch_tensors()["learnable_vector"].numpy()
    np.testing.assert_array_equal(tokens, np.repeat(vector, 257, axis=1))
    assert tokens.any()


def test_the_memory_plan_has_places_for_scenes_and_tokens(bundle: Bundle) -> None:
    buffers = {buffer.name for buffer in fixed_buffers(card_memory(bundle.manifest), bundle.manifest)}
    names = ("tokens", "start_noise", "background", "blend", "scene")
    assert {place_name(DENOISE, name) for name in names} <= buffers


def test_signatures_of_the_published_sizes() -> None:
    specs = graph_specs(ImprintArchitecture(), (512, 768))
    assert specs[DENOISE].tensor("scene").shape == ("scenes", 5, 64, 96)
    assert specs[DENOISE].tensor("tokens").shape == ("conditions", 257, 1024)


def test_a_network_without_weights_takes_no_memory() -> None:
    source = ImprintSource.without_weights(ImprintArchitecture(), torch.float16)
    assert [graph.spec.name for graph in source.graphs((512, 512), "fp16")] == list(
        graph_specs(ImprintArchitecture(), (512, 512))
    )
    assert source.description.startswith("IMPRINT, 2229 million weights, float16: UNet predicts the noise")


@pytest.mark.parametrize("write", [imprint_file, object_stitch_file])
def test_what_does_not_go_with_it_is_refused(write: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoint")
    with pytest.raises(AnyDoorError, match=r"--prediction is not for IMPRINT, which takes --unet-head"):
        open_source(path, SourceOptions(prediction="v"))
    with pytest.raises(AnyDoorError, match="must be a multiple of 16 for this network, not 100"):
        open_source(path).check_size((100, 100))

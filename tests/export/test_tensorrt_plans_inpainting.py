"""Plans of a network that draws prompts into scenes, built by TensorRT for RTX; no card runs them here."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.backends.tensorrt.library import Library, check_header, load_library
from engines.bundle import Bundle
from engines.spec import BankSpec
from runtime.systems.tokenizer import open_tokenizer
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

RTX = "tensorrt_rtx"


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip(RTX, reason="needs pip install '.[tensorrt]'")
    return load_library(RTX)


@pytest.fixture(scope="module")
def source() -> Bundle:
    return Bundle.open(tiny_stable_diffusion_bundle(9))


@pytest.fixture(scope="module")
def plans(tiny_inpainting_plan_bundle: Path) -> Bundle:
    """Built in a process without PyTorch."""
    return Bundle.open(tiny_inpainting_plan_bundle)


def test_all_graphs_are_built(source: Bundle, plans: Bundle, library: Library) -> None:
    assert list(plans.manifest.graphs) == ["denoise", "text_encoder", "encode", "decode"]
    for graph, record in plans.manifest.graphs.items():
        plans.verify(graph)
        check_header(library, plans, graph)
        assert [file.path for file in record.files] == [f"{graph}.plan"]
        assert record.scratch_bytes[RTX] > 0
        assert record.error == source.manifest.graphs[graph].error
    assert (plans.manifest.backend, plans.manifest.target) == (RTX, "sm86,sm89,sm120")


def test_prompts_and_scenes_are_banks_of_the_step(source: Bundle, plans: Bundle) -> None:
    """As many rows as a call has samples, and for tokens the empty prompt's besides."""
    assert plans.manifest.specs == source.manifest.specs
    step, largest = plans.manifest.step, plans.manifest.largest_sizes
    assert step.banks == (
        BankSpec("tokens", ("tokens",), "row_condition"),
        BankSpec("scene", ("background", "blend", "scene"), "row_scene"),
    )
    batch = plans.manifest.max_batch
    assert step.tensor("scene").resolve(largest) == (batch, 5, 32, 32)
    assert step.tensor("tokens").resolve(largest)[0] == 2 * batch


def test_prompts_are_read_and_constants_kept_as_in_the_source(source: Bundle, plans: Bundle) -> None:
    assert open_tokenizer(plans).encode("a cat") == open_tokenizer(source).encode("a cat")
    assert plans.manifest.constants == source.manifest.constants
    plans.verify_all()

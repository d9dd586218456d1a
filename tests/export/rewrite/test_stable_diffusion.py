"""The graphs of Stable Diffusion: what the rules make of them, operator by operator."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import onnx_ir as ir
import pytest
import torch

from export.example_inputs import example_inputs
from export.onnx_graph import trace
from export.precision import TORCH_DTYPES, keep_float32_layers
from export.rewrite.rewriting import rewrite
from export.systems.stable_diffusion import (
    DENOISE,
    DIMENSIONS,
    ENCODE,
    GRAPH_MODULES,
    PARTS,
    TEXT_ENCODER,
    graph_specs,
)
from tests.export.rewrite.graphs import TOLERANCE, evaluate, relative_error
from training.network.stable_diffusion import BUILDERS, StableDiffusion, StableDiffusionArchitecture

# one level and one block each; the heads of the text encoder are 64 wide
NEWER = StableDiffusionArchitecture(
    unet_channels=(64,),
    unet_attention=(True,),
    unet_layers=1,
    scene_channels=5,
    token_width=128,
    vae_channels=(64, 64),
    vae_layers=1,
    text_width=128,
    text_layers=2,
    text_heads=2,
    text_mlp_width=96,
    text_vocabulary=600,
)
OLDER = replace(NEWER, text_encoder="clip", unet_head_count=8, unet_linear_projection=False, scene_channels=0)
SIZE = (8, 12)

PLAIN = ("Softmax", "InstanceNormalization", "Conv", "Trilu", "Where")
"""Operators of which none is left."""

EMBEDDINGS = "its summands differ in shape"
"""Those of a text's tokens and of their places."""


def model(architecture: StableDiffusionArchitecture, graph: str, precision: str) -> ir.Model:
    """A copy of a graph, which may be changed."""
    return _traced(architecture, graph, precision).clone()


@cache
def _traced(architecture: StableDiffusionArchitecture, graph: str, precision: str) -> ir.Model:
    torch.manual_seed(0)
    part = torch.nn.Module.to(BUILDERS[PARTS[graph]](architecture), TORCH_DTYPES[precision]).eval()
    if precision == "fp16":
        keep_float32_layers(part)
    network = StableDiffusion(architecture, {PARTS[graph]: part})
    return trace(GRAPH_MODULES[graph](network).eval(), graph_specs(architecture, SIZE)[graph]).model


@pytest.mark.parametrize(
    ("architecture", "graph", "precision", "matches", "kept"),
    [
        (
            NEWER,
            TEXT_ENCODER,
            "fp16",
            {"causal MultiHeadAttention": 2, "SkipLayerNormalization with bias": 4},
            {"a GELU that is no gate": 2, EMBEDDINGS: 1},
        ),
        (OLDER, TEXT_ENCODER, "fp32", {"causal MultiHeadAttention": 2}, {EMBEDDINGS: 1}),
        (NEWER, ENCODE, "fp32", {"MultiHeadAttention": 1, "GroupNorm": 10, "NhwcConv": 12}, {}),
        (
            OLDER,
            DENOISE,
            "fp16",
            # convolutions project into and out of each of the four transformers
            {"MultiHeadAttention": 8, "GroupNorm": 15, "NhwcConv": 22},
            {
                "its width is 512, not two times 1280, 2560, 5120": 4,
                "its width is 64, not 320, 640, 1280": 4,
            },
        ),
    ],
    ids=["text encoder of 2.x", "text encoder of 1.x", "encoder", "step of 1.x"],
)
def test_patterns_for_the_cuda_provider(
    architecture: StableDiffusionArchitecture,
    graph: str,
    precision: str,
    matches: dict[str, int],
    kept: dict[str, int],
) -> None:
    exported = model(architecture, graph, precision)
    inputs = example_inputs(graph_specs(architecture, SIZE)[graph], DIMENSIONS)
    expected = evaluate(exported, inputs)
    report = rewrite(exported, "cuda")
    assert {rule: report.matches[rule] for rule in matches} == matches
    assert {of.reason: len(of.nodes) for of in report.kept} == kept
    assert not any(report.after[kind] for kind in PLAIN)
    for found, wanted in zip(evaluate(exported, inputs), expected):
        assert relative_error(found, wanted) < TOLERANCE["float32" if precision == "fp32" else "float16"]


def test_attention_of_the_text_encoder_for_the_cpu() -> None:
    report = rewrite(model(OLDER, TEXT_ENCODER, "fp32"), "cpu")
    assert (report.matches["causal MultiHeadAttention"], report.kept) == (2, ())
    assert not any(report.after[kind] for kind in PLAIN)

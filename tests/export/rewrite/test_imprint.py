"""The ID encoder of IMPRINT, with its content adapter: what the rules make of it, operator by operator."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch

from export.example_inputs import example_inputs
from export.onnx_graph import trace
from export.precision import TORCH_DTYPES, keep_float32_layers
from export.rewrite.rewriting import rewrite
from export.systems.imprint import DIMENSIONS, ID_ENCODER, IDEncoderGraph, graph_specs
from export.systems.reference import EXAMPLES
from tests.export.rewrite.graphs import TOLERANCE, evaluate, relative_error
from tests.support.imprint import TINY_IMPRINT, TINY_OBJECT_STITCH
from training.network.imprint import Imprint, ImprintArchitecture

# the one head of the published adapter is as wide as the tokens, and that is wider than the kernel takes
WIDE = replace(TINY_IMPRINT, dino_width=512, dino_heads=8, adapter_layers=2)
NARROW = replace(TINY_OBJECT_STITCH, dino_width=128, dino_heads=2, adapter_heads=2)


def model(architecture: ImprintArchitecture, precision: str) -> ir.Model:
    torch.manual_seed(0)
    network = Imprint(architecture, [ID_ENCODER]).to(TORCH_DTYPES[precision]).eval()
    if precision == "fp16":
        keep_float32_layers(network)
    spec = graph_specs(architecture, (64, 64))[ID_ENCODER]
    return trace(IDEncoderGraph(network).eval(), spec).model


@pytest.mark.parametrize(
    ("architecture", "precision", "attentions", "kept"),
    [
        (NARROW, "fp32", 4, {}),
        pytest.param(
            WIDE, "fp16", 1, {"heads of 512 channels are wider than 256": 2}, marks=pytest.mark.nightly
        ),
    ],
    ids=["CLIP", "DINOv2"],
)
def test_patterns_for_the_cuda_provider(
    architecture: ImprintArchitecture, precision: str, attentions: int, kept: dict[str, int]
) -> None:
    exported = model(architecture, precision)
    inputs = example_inputs(graph_specs(architecture, (64, 64))[ID_ENCODER], DIMENSIONS, examples=EXAMPLES)
    expected = evaluate(exported, inputs)
    report = rewrite(exported, "cuda")
    assert report.matches["MultiHeadAttention"] == attentions
    reasons = {of.reason: len(of.nodes) for of in report.kept}
    assert {reason: count for reason, count in reasons.items() if "heads" in reason} == kept
    for found, wanted in zip(evaluate(exported, inputs), expected):
        assert relative_error(found, wanted) < TOLERANCE["float32" if precision == "fp32" else "float16"]

"""Whole networks: patterns are replaced where the kernels take them and named where they do not."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from engines.engine import Array
from engines.spec import GraphSpec, TensorSpec
from export.example_inputs import example_inputs
from export.onnx_graph import trace
from export.options import DETERMINISTIC_CUDA
from export.precision import TORCH_DTYPES, keep_float32_layers
from export.rewrite.report import Report
from export.rewrite.rewriting import rewrite
from export.scratch import result_bytes
from tests.export.rewrite.graphs import OPERATORS, TOLERANCE, evaluate, relative_error

TYPES = {"fp32": "float32", "fp16": "float16"}


class Block(nn.Module):
    """One of everything that the networks are made of."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        c, width = channels, channels // heads
        self.conv_in = nn.Conv2d(4, c, 3, padding=1)
        self.embedding = nn.Linear(8, 16)
        self.resnet = ResnetBlock2D(in_channels=c, temb_channels=16, groups=groups)
        self.transformer = Transformer2DModel(
            heads, width, c, norm_num_groups=groups, cross_attention_dim=12, use_linear_projection=True
        )
        self.down, self.up = Downsample2D(c, use_conv=True), Upsample2D(c, use_conv=True)
        self.merge = ResnetBlock2D(in_channels=2 * c, out_channels=c, temb_channels=16, groups=groups)
        # as in the VAE: of pictures whose axes have become one
        self.attention = Attention(
            c, heads=heads, dim_head=width, norm_num_groups=groups, residual_connection=True, bias=True,
            _from_deprecated_attn_block=True,
        )  # fmt: skip
        self.norm_out, self.conv_out = nn.GroupNorm(groups, c), nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, picture: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """(N, 4, 4, 4), (N, 8), (N, 5, 12) -> (N, 3, 4, 4)."""
        dtype = self.conv_in.weight.dtype
        embedding = self.embedding(time.to(dtype))
        skip = self.resnet(self.conv_in(picture.to(dtype)), embedding)
        hidden = self.transformer(skip, tokens.to(dtype), return_dict=False)[0]
        hidden = self.up(self.down(hidden))
        hidden = self.attention(self.merge(torch.cat([hidden, skip], 1), embedding))
        return self.conv_out(nn.functional.silu(self.norm_out(hidden))).float()  # type: ignore[no-any-return]


SPEC = GraphSpec(
    "block",
    "window",
    inputs=(
        TensorSpec("picture", "float32", ("rows", 4, 4, 4)),
        TensorSpec("time", "float32", ("rows", 8)),
        TensorSpec("tokens", "float32", ("rows", 5, 12)),
    ),
    outputs=(TensorSpec("result", "float32", ("rows", 3, 4, 4)),),
)

BOTH = pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.nightly), "fp16"])

TAKEN = {"channels": 320, "heads": 5, "groups": 32}
NOT_TAKEN = {"channels": 36, "heads": 3, "groups": 12}


def block(precision: str, sizes: dict[str, int]) -> ir.Model:
    """A copy of the graph of a block, which may be changed."""
    return _traced(precision, *sizes.values()).clone()


@cache
def _traced(precision: str, channels: int, heads: int, groups: int) -> ir.Model:
    torch.manual_seed(0)
    module = Block(channels, heads, groups).eval().to(TORCH_DTYPES[precision])
    if precision == "fp16":
        keep_float32_layers(module)
    return trace(module, SPEC).model


def compare(model: ir.Model, inputs: dict[str, Array], dtype: str, target: str = "cuda") -> Report:
    """Rewrites a graph, and compares what it computes."""
    expected = evaluate(model, inputs)
    report = rewrite(model, target)
    for found, wanted in zip(evaluate(model, inputs), expected):
        assert found.dtype == wanted.dtype
        if found.dtype == np.uint8:
            assert np.abs(found.astype(int) - wanted).max() <= 1
        else:
            assert relative_error(found, wanted) < TOLERANCE[dtype]
    return report


def test_results_in_the_operators_of_cards_are_as_large_as_estimated() -> None:
    model = block("fp16", TAKEN)
    rewrite(model, "cuda")
    proto = ir.to_proto(ir.external_data.load_to_model(model))
    inputs = example_inputs(SPEC, {"rows": 2})
    evaluator = ReferenceEvaluator(proto, new_ops=list(OPERATORS))
    results = evaluator.run(None, dict(inputs), intermediate=True)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    del proto.graph.value_info[:]
    estimated = result_bytes(proto)
    names = [name for node in proto.graph.node for name in node.output if name]
    assert {name: estimated[name] for name in names} == {name: results[name].nbytes for name in names}


@BOTH
def test_sizes_that_the_kernels_take(precision: str) -> None:
    model = block(precision, TAKEN)
    report = compare(model, example_inputs(SPEC, {"rows": 2}), TYPES[precision])
    assert report.kept == ()
    expected = {
        "MultiHeadAttention": 3,
        "GroupNorm": 7,
        "GroupNorm with SiLU": 5,
        "NhwcConv": 9,
        "BiasSplitGelu": 1,
        "SkipLayerNormalization with bias": 2,
        "SkipGroupNorm": 5,
        "BiasAdd": 1,
        "BiasAdd of a picture": 1,
    }
    assert {rule: report.matches[rule] for rule in expected} == expected
    assert report.matches["LayerNormalization in FP16"] == (3 if precision == "fp16" else 0)
    plain = ("Softmax", "InstanceNormalization", "Conv", "Erf", "Split")
    assert not any(report.after[kind] for kind in plain)
    # one for the input, one for the output
    assert report.after["Transpose"] == 2


@BOTH
def test_deterministic_operators(precision: str) -> None:
    """Nothing of the provider's group normalisation is left, and as many transposes cancel as with it."""
    model = block(precision, TAKEN)
    report = compare(model, example_inputs(SPEC, {"rows": 2}), TYPES[precision], DETERMINISTIC_CUDA)
    assert report.kept == ()
    assert report.matches["deterministic group normalisation"] == 7
    assert report.after["ReduceMean"] == 14
    assert not report.after["com.microsoft.GroupNorm"]
    assert not report.after["InstanceNormalization"]
    assert not report.after["com.microsoft.SkipGroupNorm"]
    assert report.after["Transpose"] == 2


def kept(report: Report) -> set[tuple[str, str, int]]:
    return {(kept.rule, kept.reason, len(kept.nodes)) for kept in report.kept}


NARROW_HEADS = ("MultiHeadAttention", "heads of 12 channels are not a multiple of 8", 3)
NARROW_RESIDUAL = ("BiasAdd", "its width is 36, not 320, 640, 1280")
NARROW_GEGLU = ("BiasSplitGelu", "its width is 288, not two times 1280, 2560, 5120", 1)


def test_sizes_that_the_kernels_do_not_take() -> None:
    report = compare(block("fp16", NOT_TAKEN), example_inputs(SPEC, {"rows": 2}), "float16")
    odd_groups = ("GroupNorm", "groups of 3 channels are odd", 6)
    assert kept(report) == {NARROW_HEADS, odd_groups, NARROW_GEGLU, (*NARROW_RESIDUAL, 3)}


def test_halves_in_a_float32_bundle(tmp_path: Path) -> None:
    """Weights that are stored as FP16 and cast are weights for the rules, too."""
    from export.weights import store_exact_halves

    module = Block(**NOT_TAKEN | {"groups": 6}).eval().half().float()
    path = tmp_path / "block.onnx"
    trace(module, SPEC).save(path, external_data=True)
    store_exact_halves(path)
    model = ir.load(path)
    casts = sum(node.op_type == "Cast" for node in model.graph)
    report = compare(model, example_inputs(SPEC, {"rows": 2}), "float32")
    assert casts > 9
    assert report.matches["NhwcConv"] == 9
    assert report.after["Cast"] == 0
    assert kept(report) == {NARROW_HEADS, NARROW_GEGLU, (*NARROW_RESIDUAL, 2)}

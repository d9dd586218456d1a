"""A sum that is normalised in groups becomes one operator that also returns the sum."""

from __future__ import annotations

from functools import cache

import onnx_ir as ir
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from engines.spec import GraphSpec, TensorSpec
from export.example_inputs import example_inputs
from export.onnx_graph import trace
from export.options import DETERMINISTIC_CUDA
from export.precision import TORCH_DTYPES, keep_float32_layers
from export.rewrite.rewriting import rewrite
from tests.export.rewrite.graphs import TOLERANCE, evaluate, relative_error
from tests.export.rewrite.test_group_norm import check, group_norm


class Blocks(nn.Module):
    """A residual block whose shortcut is a convolution, and one whose shortcut is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=6, groups=4)
        self.second = ResnetBlock2D(in_channels=16, temb_channels=6, groups=4)

    def forward(self, picture: Tensor, time: Tensor) -> Tensor:
        """(N, 8, 4, 4), (N, 6) -> (N, 16, 4, 4)."""
        dtype = self.first.conv1.weight.dtype
        picture, time = picture.to(dtype), time.to(dtype)
        return self.second(self.first(picture, time), time).float()  # type: ignore[no-any-return]


SPEC = GraphSpec(
    "blocks",
    "window",
    inputs=(
        TensorSpec("picture", "float32", ("rows", 8, 4, 4)),
        TensorSpec("time", "float32", ("rows", 6)),
    ),
    outputs=(TensorSpec("result", "float32", ("rows", 16, 4, 4)),),
)


def blocks(precision: str) -> ir.Model:
    """A copy of their graph, which may be changed."""
    return _traced(precision).clone()


@cache
def _traced(precision: str) -> ir.Model:
    torch.manual_seed(0)
    module = Blocks().eval().to(TORCH_DTYPES[precision])
    if precision == "fp16":
        keep_float32_layers(module)
    return trace(module, SPEC).model


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16")])
def test_residual_blocks(precision: str, dtype: str) -> None:
    """What the timestep adds, the residual, and the biases of the convolutions before them."""
    model, inputs = blocks(precision), example_inputs(SPEC, {"rows": 2})
    [expected] = evaluate(model, inputs)
    report = rewrite(model, "cuda")
    assert report.kept == ()
    assert report.after["com.microsoft.SkipGroupNorm"] == 3
    # of the first block's input, and behind the last block no normalisation
    assert report.after["com.microsoft.GroupNorm"] == report.after["Add"] == 1
    biased = [len(node.inputs) == 3 for node in model.graph if node.op_type == "NhwcConv"]
    assert (sum(biased), len(biased)) == (1, 5)
    [found] = evaluate(model, inputs)
    assert relative_error(found, expected) < TOLERANCE[dtype]


def test_deterministic_operators_are_left_alone() -> None:
    report = rewrite(blocks("fp16"), DETERMINISTIC_CUDA)
    assert not report.after["com.microsoft.SkipGroupNorm"]
    assert report.matches["SkipGroupNorm"] == 0


@pytest.mark.parametrize("skip", [(8, 3, 4), (8, 1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_skip_of_the_pictures_shape_or_of_one_pixel(dtype: str, skip: tuple[int, ...]) -> None:
    model = check(group_norm(dtype, skip=skip), TOLERANCE[dtype])
    [norm] = [node for node in model.graph if node.op_type == "SkipGroupNorm"]
    # the bias is that of the convolution
    assert len(norm.inputs) == 5


def test_a_skip_of_another_shape_stays_an_addition() -> None:
    report = rewrite(group_norm(skip=(8, 3, 1)), "cuda")
    assert [(kept.rule, kept.reason) for kept in report.kept] == [
        ("SkipGroupNorm", "its summand is broadcast")
    ]

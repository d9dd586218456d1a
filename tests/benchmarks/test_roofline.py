"""Operations and bytes counted from graphs: against graphs counted by hand, and PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import main
from benchmarks.support import contender_rounds, peaks
from benchmarks.support.graph_costs import GraphCost, count_bundle, count_graph
from benchmarks.support.graphs import CONTROL, DECODE, DENOISE, GRAPHS, ID_ENCODER
from benchmarks.support.limits import picture_limit
from benchmarks.support.peaks import PUBLISHED, Peak
from engines.bundle import Bundle
from engines.errors import BundleError
from export.example_inputs import example_inputs
from export.systems.anydoor import GRAPH_MODULES, PARTS
from training.network.checkpoint import read_checkpoint

Capture = pytest.CaptureFixture[str]


def saved(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int | str, ...]],
    weights: dict[str, tuple[int, ...]],
    output: tuple[int | str, ...],
) -> Path:
    """A graph of float32 tensors whose last node makes `y`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def test_convolution(tmp_path: Path) -> None:
    """Each of 2 x 8 x 5 x 5 outputs takes 4 inputs x 3 x 3 products."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1])
    path = saved(tmp_path / "g.onnx", [node], {"x": (2, 4, 10, 10)}, {"w": (8, 4, 3, 3)}, (2, 8, 5, 5))
    cost = count_graph(path, "graph")
    assert cost.matrix_flops == 2 * (2 * 8 * 5 * 5) * (4 * 3 * 3)
    assert cost.weight_bytes == 4 * 8 * 4 * 3 * 3
    assert cost.io_bytes == 4 * (2 * 4 * 10 * 10 + 2 * 8 * 5 * 5)
    assert cost.unfused_bytes == cost.least_bytes


def test_grouped_convolution_and_its_transpose(tmp_path: Path) -> None:
    grouped = helper.make_node("Conv", ["x", "w"], ["h"], group=4, pads=[1, 1, 1, 1])
    transposed = helper.make_node("ConvTranspose", ["h", "v"], ["y"], strides=[2, 2])
    weights = {"w": (8, 1, 3, 3), "v": (8, 6, 2, 2)}
    path = saved(tmp_path / "g.onnx", [grouped, transposed], {"x": (1, 4, 7, 7)}, weights, (1, 6, 14, 14))
    assert count_graph(path, "graph").matrix_flops == 2 * (8 * 49 * 9) + 2 * (8 * 49 * 6 * 4)


def test_matrix_products(tmp_path: Path) -> None:
    """A batch of 3 products of (5, 7) and (7, 2), then one of a transposed (14, 15) and (15, 4)."""
    nodes = [
        helper.make_node("MatMul", ["a", "b"], ["product"]),
        helper.make_node("Reshape", ["product", "shape"], ["flat"]),
        helper.make_node("Gemm", ["flat", "c"], ["y"], transA=1),
    ]
    path = saved(tmp_path / "g.onnx", nodes, {"a": (3, 5, 7), "b": (7, 2)}, {"c": (15, 4)}, (2, 4))
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([15, 2]), "shape"))
    onnx.save(model, path)
    assert count_graph(path, "graph").matrix_flops == 2 * (3 * 5 * 2) * 7 + 2 * (2 * 4) * 15


@pytest.mark.parametrize("separate_heads", [True, False])
def test_fused_attention(tmp_path: Path, separate_heads: bool) -> None:
    """2 pictures, 4 heads of width 8, 10 queries, 6 keys: scores, then their products with the values."""
    if separate_heads:
        shapes, output = {"q": (2, 4, 10, 8), "k": (2, 4, 6, 8), "v": (2, 4, 6, 8)}, (2, 4, 10, 8)
        node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    else:
        shapes, output = {"q": (2, 10, 32), "k": (2, 6, 32), "v": (2, 6, 32)}, (2, 10, 32)
        node = helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=4, kv_num_heads=4)
    cost = count_graph(saved(tmp_path / "g.onnx", [node], shapes, {}, output), "graph")
    assert cost.matrix_flops == 2 * (2 * 4 * 10 * 6) * (8 + 8)


def test_arithmetic_counts_once_per_value_and_moving_not_at_all(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Mul", ["x", "s"], ["m"]),
        helper.make_node("Transpose", ["m"], ["y"], perm=[1, 0]),
    ]
    cost = count_graph(saved(tmp_path / "g.onnx", nodes, {"x": (3, 5)}, {}, (5, 3)), "graph")
    assert (cost.matrix_flops, cost.other_flops) == (0, 2 * 15)
    assert cost.unfused_bytes == 4 * (2 * 15 + 3 * 15 + 2 * 15)
    assert cost.least_bytes == 4 * 2 * 15


def test_variable_dimensions_take_the_sizes_that_are_given(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = saved(tmp_path / "g.onnx", [node], {"x": ("rows", 3)}, {"w": (3, 5)}, ("rows", 5))
    assert count_graph(path, "graph", {"rows": 4}).matrix_flops == 2 * 4 * 5 * 3


def test_a_shape_that_depends_on_values_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["n"]), helper.make_node("Cast", ["n"], ["y"], to=1)]
    with pytest.raises(BundleError, match="cannot be inferred"):
        count_graph(saved(tmp_path / "g.onnx", nodes, {"x": (3, 5)}, {}, (2, "found")), "graph")


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_of_a_bundle_agree_with_the_counter_of_pytorch(
    tiny_bundle: Path, tiny_checkpoint: Path, graph: str
) -> None:
    bundle = Bundle.open(tiny_bundle)
    module = GRAPH_MODULES[graph](read_checkpoint(tiny_checkpoint).load_part(PARTS[graph]))
    inputs = example_inputs(bundle.manifest.specs[graph], bundle.manifest.typical_sizes)
    # PyTorch counts attention when it is made of products only
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(*(torch.from_numpy(array) for array in inputs.values()))
    assert count_bundle(bundle)[graph].matrix_flops == counter.get_total_flops()


def test_weights_are_those_of_the_checkpoint(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    for graph, cost in count_bundle(bundle).items():
        stored = sum(record.bytes for record in bundle.manifest.graphs[graph].files[1:])
        assert cost.weight_bytes == pytest.approx(stored, rel=0.02)


COST = GraphCost(DENOISE, matrix_flops=10**12, other_flops=0, weight_bytes=10**9, io_bytes=0, unfused_bytes=0)


def test_the_limit_is_the_slower_of_computing_and_moving() -> None:
    assert COST.limit(Peak("m", tflops=0.5, gbs=10, source="")) == pytest.approx(2.0)
    assert COST.limit(Peak("m", tflops=100, gbs=10, source="")) == pytest.approx(0.1)
    assert COST.limit(Peak("m", tflops=100, gbs=10, source=""), bytes_factor=0.5) == pytest.approx(0.05)


def test_a_reroll_needs_neither_detail_maps_nor_tokens() -> None:
    costs = {graph: replace(COST, graph=graph) for graph in GRAPHS}
    peak = Peak("m", tflops=1, gbs=1000, source="")
    assert picture_limit(costs, peak, steps=50) == pytest.approx(50 * 2 + 1 + 1)
    assert picture_limit(costs, peak, steps=50, reroll=True) == pytest.approx(50 + 1)


def test_full_size_on_a_4090_is_the_limit_that_the_design_names() -> None:
    """411 + 146 GMAC per half and step, 1257 for the decoder, 300 for the ID encoder: 114 TFLOP."""
    gmac = {ID_ENCODER: 300, CONTROL: 2 * 142, DENOISE: 2 * 411, DECODE: 1257}
    costs = {g: GraphCost(g, int(2e9 * n), 0, 0, 0, 0) for g, n in gmac.items()}
    card = next(peak for peak in PUBLISHED if peak.machine == "RTX 4090")
    assert picture_limit(costs, card, steps=50) == pytest.approx(0.69, abs=0.01)


def test_the_command_prints_counts_the_limit_here_and_marked_estimates(
    tiny_bundle: Path, capsys: Capture
) -> None:
    assert main(["--bundle", str(tiny_bundle), "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    for text in ("matrix GFLOP", "this machine", "ESTIMATE", "not measured", "RTX 4090", "Orin Nano", "H200"):
        assert text in printed


def test_the_rates_are_those_of_so_many_threads(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The library of the product reads their number when it is loaded."""
    given: list[str] = []

    def measured(module: str, run: str, variables: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        given.append(variables["OMP_NUM_THREADS"])
        yield asdict(Peak("three threads", 1, 1, ""))

    monkeypatch.setattr(contender_rounds, "measured", measured)
    assert main(["--bundle", str(tiny_bundle), "--threads", "3"]) == 0
    assert given == ["3"]
    assert "three threads: 1000 GFLOP/s" in capsys.readouterr().out


def test_measured_rates_say_of_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_PRODUCT_SIDES": {"cpu": (32,)}, "_COPIED_BYTES": {"cpu": 4096}}.items():
        monkeypatch.setattr(peaks, name, value)
    monkeypatch.setattr(peaks, "_SECONDS", 0.01)
    for precision in ("fp32", "bf16"):
        found = peaks.measure_peak(1, "cpu", precision)
        assert (found.device, found.precision) == ("cpu", precision)


def test_plans_are_not_counted(tiny_plan_bundle: Path, capsys: Capture) -> None:
    assert main(["--bundle", str(tiny_plan_bundle)]) == 2
    assert "counted in the bundle of ONNX graphs" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--threads", "--steps"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_numbers_that_no_machine_has_are_refused(
    tiny_bundle: Path, capsys: Capture, option: str, value: str
) -> None:
    assert main(["--bundle", str(tiny_bundle), option, value]) == 2
    assert capsys.readouterr().err == f"roofline.py: {option} must be at least 1, not {value}\n"


def test_no_bundle(tmp_path: Path, capsys: Capture) -> None:
    assert main(["--bundle", str(tmp_path / "none")]) == 2
    assert "there is no bundle at" in capsys.readouterr().err

"""How fast could it be? Operations and bytes of each graph, against what a machine can do at most.

    python benchmarks/roofline.py --bundle build/engines/anydoor

Counts are taken from the ONNX graphs themselves, for one picture with guidance. A graph cannot run faster
than its matrix products at the machine's full rate, nor faster than its weights, inputs and outputs can be
moved once (Williams et al., 2009): the longer of the two is its limit. This machine's rates are measured; the
limits of other machines are estimates from what their vendor publishes, and nothing ran on them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.bundle import Bundle
from engines.errors import AnyDoorError, BundleError
from engines.spec import CONTROL, DECODE, DENOISE, GRAPHS, ID_ENCODER, MAPS, ROWS, SAMPLES
from runtime.cli.composite import BUNDLE_VARIABLE
from runtime.errors import InputError

if TYPE_CHECKING:
    from onnx import NodeProto

ONE_PICTURE = {SAMPLES: 1, ROWS: 2, "conditions": 2, MAPS: 2}
"""Sizes of one step of one picture with guidance."""

Shape = tuple[int, ...]

VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant"))
"""Operators that move nothing."""

MOVES = frozenset(
    (
        *(
            "Cast",
            "Concat",
            "ConstantOfShape",
            "Expand",
            "Gather",
            "Pad",
            "Range",
            "Resize",
            "Slice",
            "Split",
        ),
        *("Tile", "Transpose", "Where", "IsNaN", "Equal", "Less", "Greater", "Not"),
    )
)
"""Operators that move or compare values and compute nothing."""


# --- counting ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphCost:
    """What one call of a graph takes, whoever runs it."""

    graph: str
    matrix_flops: int
    """Operations of convolutions, matrix products and attention; a multiplication and an addition are two."""
    other_flops: int
    """All other arithmetic, one operation per value that an operator computes."""
    weight_bytes: int
    io_bytes: int
    """Inputs and outputs of the graph."""
    unfused_bytes: int
    """What is moved if every operator takes its inputs from memory and leaves its outputs there."""

    @property
    def least_bytes(self) -> int:
        """What has to be moved at the least: weights, inputs and outputs once, and nothing in between."""
        return self.weight_bytes + self.io_bytes

    def limit(self, peak: Peak, bytes_factor: float = 1.0) -> float:
        """Seconds that a call takes at the least.

        Args:
            peak: what the machine can do.
            bytes_factor: size of a value where it runs over its size in the graph; 0.5 for FP32 run as FP16.
        """
        return max(
            self.matrix_flops / (peak.tflops * 1e12), self.least_bytes * bytes_factor / (peak.gbs * 1e9)
        )


def matrix_flops(node: NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """Operations of a convolution, matrix product or attention; 0 for any other operator."""
    attributes = {a.name: a for a in node.attribute}
    if node.op_type in ("Conv", "ConvTranspose"):
        # weights (outputs, inputs / groups, *kernel); of a transposed one (inputs, outputs / groups, *kernel)
        positions = output if node.op_type == "Conv" else inputs[0]
        return 2 * math.prod(positions) * math.prod(inputs[1][1:])
    if node.op_type == "MatMul":
        return 2 * math.prod(output) * inputs[0][-1]
    if node.op_type == "Gemm":
        transposed = "transA" in attributes and attributes["transA"].i
        return 2 * math.prod(output) * inputs[0][0 if transposed else 1]
    if node.op_type == "Attention":
        return _attention_flops(inputs, {name: a.i for name, a in attributes.items()})
    return 0


def _attention_flops(inputs: Sequence[Shape], attributes: Mapping[str, int]) -> int:
    queries, keys, values = inputs[:3]
    if len(queries) == 4:
        heads, value_width = queries[1], values[3]
        query_length, key_length, width = queries[2], keys[2], queries[3]
    else:
        heads, width = attributes["q_num_heads"], queries[2] // attributes["q_num_heads"]
        query_length, key_length = queries[1], keys[1]
        value_width = values[2] // attributes["kv_num_heads"]
    return 2 * queries[0] * heads * query_length * key_length * (width + value_width)


def count_graph(path: Path, name: str, sizes: Mapping[str, int] = ONE_PICTURE) -> GraphCost:
    """Counts a graph; its weights are not read.

    Args:
        path: an ONNX file.
        name: what to call the graph.
        sizes: variable dimension -> its size.

    Raises:
        BundleError: a shape cannot be told.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_value = sizes[dimension.dim_param]
    # the shapes that the exporter noted speak of variable dimensions
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    known = {value.name: _shape(value) for value in values}
    known |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    width = {value.name: _itemsize(value.type.tensor_type.elem_type) for value in values}
    width |= {tensor.name: _itemsize(tensor.data_type) for tensor in graph.initializer}

    def shape(name: str) -> Shape:
        found = known.get(name)
        if found is None:
            raise BundleError(f"the shape of '{name}' in '{path}' cannot be told: it cannot be counted")
        return found

    def nbytes(names: set[str]) -> int:
        return sum(math.prod(shape(name)) * width[name] for name in names)

    matrix = other = unfused = 0
    for node in graph.node:
        inputs, outputs = [name for name in node.input if name], [name for name in node.output if name]
        if node.op_type in VIEWS:
            continue
        unfused += nbytes({*inputs, *outputs})
        flops = matrix_flops(node, [shape(name) for name in inputs], shape(outputs[0]))
        matrix += flops
        if not flops and node.op_type not in MOVES:
            other += sum(math.prod(shape(name)) for name in outputs)
    weights = {t.name for t in graph.initializer}
    borders = {v.name for v in (*graph.input, *graph.output)} - weights
    return GraphCost(name, matrix, other, nbytes(weights), nbytes(borders), unfused)


def _shape(value: Any) -> Shape | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
        return None
    return tuple(d.dim_value for d in kind.shape.dim)


def _itemsize(element_type: int) -> int:
    import onnx

    return int(onnx.helper.tensor_dtype_to_np_dtype(element_type).itemsize)


def count_bundle(bundle: Bundle, sizes: Mapping[str, int] = ONE_PICTURE) -> dict[str, GraphCost]:
    """Graph -> what a call of it takes.

    Raises:
        BundleError: the bundle holds plans, which cannot be counted.
    """
    for graph in GRAPHS:
        if bundle.graph_file(graph).suffix != ".onnx":
            raise BundleError(
                f"'{bundle.path}' holds plans: operations are counted in the bundle of ONNX graphs that they "
                "were built from"
            )
    return {graph: count_graph(bundle.graph_file(graph), graph, sizes) for graph in GRAPHS}


# --- what machines can do ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """What a machine can do at the most."""

    machine: str
    tflops: float
    """10^12 operations of matrix products per second."""
    gbs: float
    """10^9 bytes read or written per second."""
    source: str
    """How the figures came about, and what they mean."""


_DENSE = "dense FP16 on tensor cores"

PUBLISHED = (
    Peak("RTX 4090", 165.2, 1008, f"published: {_DENSE}, FP32 accumulation"),
    Peak(
        "Jetson AGX Orin 64 GB",
        42.5,
        204.8,
        f"published: {_DENSE}; a quarter of the GPU's 170 sparse INT8 TOPS",
    ),
    Peak(
        "Jetson Orin NX 16 GB", 15.0, 102.4, f"published: {_DENSE}; from AGX Orin by cores and clock, 918 MHz"
    ),
    Peak(
        "Jetson Orin Nano 8 GB", 10.0, 68.0, f"published: {_DENSE}; a quarter of 40 sparse INT8 TOPS, 625 MHz"
    ),
    Peak("H200 SXM", 989.5, 4800, f"published: {_DENSE}, FP32 accumulation"),
)
"""Published figures; the Jetsons' are of their GPU alone, at full clock and without the "super" modes."""

_PRODUCT_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
"""Small ones too: on a busy machine a short product is sometimes left alone, a long one never."""
_COPIED_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
_SECONDS = 1.0

Work = Callable[[], object]


def measure_peak(threads: int, device: str = "cpu", dtype: str = "float32") -> Peak:
    """This machine's rates: the best of many products of large matrices, and of many large copies.

    Args:
        threads: of the copy; those of the product are set by OMP_NUM_THREADS before NumPy is imported.
        device: cpu or cuda.
        dtype: of the product; all but float32 on the CPU is left to PyTorch.
    """
    by_numpy = device == "cpu" and dtype == "float32"
    moved, sides = _COPIED_BYTES[device], _PRODUCT_SIDES[device]
    products = [_numpy_product(side) if by_numpy else _torch_product(side, device, dtype) for side in sides]
    copy = _numpy_copy(moved, threads) if device == "cpu" else _torch_copy(moved, device)
    return Peak(
        f"this machine ({device}, {threads} threads)" if device == "cpu" else f"this machine ({device})",
        max(2 * side**3 / _best_seconds(product) for side, product in zip(sides, products)) / 1e12,
        2 * moved / _best_seconds(copy) / 1e9,
        f"measured: {dtype} matrix product in {'NumPy' if by_numpy else 'PyTorch'}, and copy",
    )


def _best_seconds(work: Work) -> float:
    best, until = math.inf, time.perf_counter() + _SECONDS
    while (started := time.perf_counter()) < until:
        work()
        best = min(best, time.perf_counter() - started)
    return best


def _numpy_product(side: int) -> Work:
    left, right = np.random.default_rng(0).standard_normal((2, side, side), dtype=np.float32)
    result = np.empty_like(left)
    return lambda: np.matmul(left, right, out=result)


def _numpy_copy(nbytes: int, threads: int) -> Work:
    source = np.ones((threads, nbytes // threads // 4), np.float32)
    target = np.zeros_like(source)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda part: np.copyto(target[part], source[part]), range(threads)))


def _torch_product(side: int, device: str, dtype: str) -> Work:
    import torch

    left, right = torch.randn(2, side, side, device=device).to(getattr(torch, dtype))
    return _finished(lambda: left @ right, device)


def _torch_copy(nbytes: int, device: str) -> Work:
    import torch

    source = torch.ones(nbytes // 4, device=device)
    target = torch.zeros_like(source)
    return _finished(lambda: target.copy_(source), device)


def _finished(work: Work, device: str) -> Work:
    import torch

    def run() -> None:
        work()
        if device != "cpu":
            torch.cuda.synchronize()

    return run


# --- tables -----------------------------------------------------------------------------------------------


def count_table(costs: Mapping[str, GraphCost]) -> str:
    """Operations and bytes of every graph."""
    head = f"{'graph':<12} {'matrix GFLOP':>13} {'other GFLOP':>12} {'weights MB':>11} {'in and out MB':>14}"
    lines = [f"{head} {'unfused MB':>11}"]
    for graph, cost in costs.items():
        lines.append(
            f"{graph:<12} {cost.matrix_flops / 1e9:>13.2f} {cost.other_flops / 1e9:>12.3f} "
            f"{cost.weight_bytes / 1e6:>11.1f} {cost.io_bytes / 1e6:>14.1f} {cost.unfused_bytes / 1e6:>11.0f}"
        )
    return "\n".join(lines)


def picture_limit(
    costs: Mapping[str, GraphCost], peak: Peak, steps: int, reroll: bool = False, bytes_factor: float = 1.0
) -> float:
    """Seconds that a picture takes at the least; of a re-roll only the latent has to be computed anew."""
    limits = {graph: cost.limit(peak, bytes_factor) for graph, cost in costs.items()}
    repeated = limits[DENOISE] + (0 if reroll else limits[CONTROL])
    return steps * repeated + limits[DECODE] + (0 if reroll else limits[ID_ENCODER])


def estimate_table(costs: Mapping[str, GraphCost], precision: str, steps: int = 50) -> str:
    """Limits of machines that nothing ran on, in FP16."""
    factor = 0.5 if precision == "fp32" else 1.0
    head = f"{'ESTIMATE, FP16':<22} {'TFLOP/s':>8} {'GB/s':>6}"
    head += "".join(f" {graph + ' ms':>13}" for graph in GRAPHS)
    lines = [f"{head} {f'{steps} steps s':>11} {'re-roll s':>10}"]
    for peak in PUBLISHED:
        row = f"{peak.machine:<22} {peak.tflops:>8.1f} {peak.gbs:>6.0f}"
        row += "".join(f" {costs[graph].limit(peak, factor) * 1e3:>13.3f}" for graph in GRAPHS)
        whole = picture_limit(costs, peak, steps, bytes_factor=factor)
        reroll = picture_limit(costs, peak, steps, reroll=True, bytes_factor=factor)
        lines.append(f"{row} {whole:>11.2f} {reroll:>10.2f}")
    lines.append("Computed from published figures, not measured; no implementation reaches them:")
    lines += [f"  {peak.machine}: {peak.source}" for peak in PUBLISHED]
    return "\n".join(lines)


def limit_table(costs: Mapping[str, GraphCost], peak: Peak, steps: int = 50) -> str:
    """Limits on a machine whose rates were measured."""
    lines = [f"{peak.machine}: {peak.tflops * 1e3:.0f} GFLOP/s, {peak.gbs:.1f} GB/s ({peak.source})"]
    lines += [f"  {graph}: at least {cost.limit(peak):.4f} s per call" for graph, cost in costs.items()]
    lines.append(
        f"  a picture, {steps} steps with guidance: at least {picture_limit(costs, peak, steps):.2f} s"
    )
    return "\n".join(lines)


def as_json(costs: Mapping[str, GraphCost], precision: str, steps: int = 50) -> dict[str, Any]:
    """Counts and estimates for a results file."""
    factor = 0.5 if precision == "fp32" else 1.0
    estimates = []
    for peak in PUBLISHED:
        limits = {graph: cost.limit(peak, factor) for graph, cost in costs.items()}
        whole = picture_limit(costs, peak, steps, bytes_factor=factor)
        estimates.append({**asdict(peak), "limit_seconds": limits, "picture_seconds": whole, "steps": steps})
    return {"graphs": [asdict(cost) for cost in costs.values()], "estimates_fp16": estimates}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="roofline.py",
        description="Operations and bytes of each graph of a bundle, and how fast it could run at the most.",
        epilog="examples:\n"
        "  python benchmarks/roofline.py --bundle build/engines/anydoor\n"
        "  python benchmarks/roofline.py --bundle examples/anydoor-small --steps 20 --threads 2\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--bundle",
        type=Path,
        default=Path(os.environ.get(BUNDLE_VARIABLE, "examples/anydoor-small")),
        metavar="DIR",
        help="a bundle of ONNX graphs (default: the example)",
    )
    result.add_argument("--steps", type=int, default=50, metavar="N", help="of a picture (default: 50)")
    result.add_argument(
        "--threads", type=int, default=cores(), metavar="N", help="CPU threads (default: all cores)"
    )
    return result


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints counts, the limit of this machine and estimates for others; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        for name in ("steps", "threads"):
            if getattr(options, name) < 1:
                raise InputError(f"--{name} must be at least 1, not {getattr(options, name)}")
        bundle = Bundle.open(options.bundle)
        costs = count_bundle(bundle)
    except AnyDoorError as error:
        print(f"roofline.py: {error}", file=sys.stderr)
        return 2
    print(f"one picture with guidance, {bundle.manifest.precision}, per call:\n{count_table(costs)}\n")
    print(f"{limit_table(costs, measure_peak(options.threads), options.steps)}\n")
    print(estimate_table(costs, bundle.manifest.precision, options.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())

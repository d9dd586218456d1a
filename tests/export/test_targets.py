"""Graphs in the operators of an execution provider: variants for the CPU, bundles for CUDA."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from engines.backends.onnxruntime.engine import OnnxRuntimeEngine
from engines.bundle import Bundle, sha256
from engines.engine import Array, open_engine
from engines.errors import BundleError
from engines.options import EngineOptions
from export.example_inputs import example_inputs
from export.options import DETERMINISTIC_CUDA
from export.rewrite.files import rewrite_file
from tests.export.rewrite.graphs import evaluate, relative_error
from tests.support.anydoor import GRAPHS

HALF_TOLERANCE = 1e-2
"""Relative error of an FP16 network, in which the plain graph rounds after more operators."""

SIZES = {"samples": 2, "rows": 3, "conditions": 2, "maps": 3}


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_variant_computes_the_same_with_the_same_weights(tiny_bundle: Path, graph: str) -> None:
    bundle = Bundle.open(tiny_bundle)
    variant, plain = bundle.graph_file(graph, "cpu"), bundle.graph_file(graph)
    assert "MultiHeadAttention" in operators(variant)
    assert "Softmax" in operators(plain)
    assert "Softmax" not in operators(variant)
    assert not variant.with_name(f"{variant.name}.data").exists()
    record = bundle.manifest.graphs[graph]
    graphs = {**bundle.manifest.graphs, graph: replace(record, variants={})}
    inputs = example_inputs(record.spec, SIZES if graph != "decode" else {})
    results = [
        {name: engine.to_host(value) for name, value in engine.run(graph, inputs).items()}
        for engine in (
            OnnxRuntimeEngine(bundle),
            OnnxRuntimeEngine(Bundle(bundle.path, replace(bundle.manifest, graphs=graphs))),
        )
    ]
    for name, expected in results[1].items():
        np.testing.assert_allclose(results[0][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graph", GRAPHS)
def test_other_backends_take_the_plain_graph(tiny_bundle: Path, graph: str) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.graph_file(graph, "cuda") == bundle.graph_file(graph) == tiny_bundle / f"{graph}.onnx"


def test_attention_in_half_precision_has_no_kernel_on_the_cpu(tiny_half_bundle: Path) -> None:
    assert all(not record.variants for record in Bundle.open(tiny_half_bundle).manifest.graphs.values())


def test_a_damaged_variant_is_found_before_it_runs(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    file = bundle.graph_file("denoise", "cpu")
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"denoise\.cpu\.onnx"):
        open_engine(bundle, EngineOptions("onnxruntime", "cpu")).load("denoise")
    file.unlink()
    with pytest.raises(BundleError, match=r"denoise\.cpu\.onnx"):
        Bundle.open(bundle.path)


@cache
def plain_results(path: Path, graph: str) -> list[Array]:
    """What a graph of a bundle in standard operators computes."""
    bundle = Bundle.open(path)
    inputs = example_inputs(bundle.manifest.specs[graph], SIZES)
    return evaluate(ir.load(bundle.graph_file(graph)), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_bundle_for_cuda_computes_the_same(
    tiny_cuda_bundle: Path, tiny_half_bundle: Path, graph: str
) -> None:
    """By ONNX's reference evaluator, since no other machine has the operators of the CUDA provider."""
    bundles = [Bundle.open(path) for path in (tiny_cuda_bundle, tiny_half_bundle)]
    assert [bundle.manifest.target for bundle in bundles] == ["cuda", "any"]
    record = bundles[0].manifest.graphs[graph]
    assert not record.variants
    assert record.error.keys() == {tensor.name for tensor in record.spec.outputs}
    for file in record.files:
        assert sha256(tiny_cuda_bundle / file.path) == file.sha256
    assert "NhwcConv" in operators(bundles[0].graph_file(graph))
    results = evaluate(ir.load(bundles[0].graph_file(graph)), example_inputs(record.spec, SIZES))
    for tensor, found, wanted in zip(record.spec.outputs, results, plain_results(tiny_half_bundle, graph)):
        assert found.shape == wanted.shape == tensor.resolve(SIZES)
        assert relative_error(found.astype(np.float64), wanted.astype(np.float64)) < HALF_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["denoise", "control"])
def test_deterministic_operators_compute_the_same(tiny_half_bundle: Path, tmp_path: Path, graph: str) -> None:
    """With the convolutions of the provider, but without its group normalisation."""
    bundle = Bundle.open(tiny_half_bundle)
    plain, path = bundle.graph_file(graph), tmp_path / "graph.onnx"
    # of a bundle for any target, whose GEGLU is two projections already
    report = rewrite_file(plain, path, DETERMINISTIC_CUDA, strict=False)
    assert report.matches["deterministic group normalisation"] == report.before["InstanceNormalization"] > 9
    assert not {"InstanceNormalization", "GroupNorm", "Conv"} & operators(path)
    results = evaluate(ir.load(path), example_inputs(bundle.manifest.specs[graph], SIZES))
    for found, wanted in zip(results, plain_results(tiny_half_bundle, graph)):
        assert relative_error(found.astype(np.float64), wanted.astype(np.float64)) < HALF_TOLERANCE

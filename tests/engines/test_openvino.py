"""OpenVINO beside ONNX Runtime on the same bundle: what only it has, and what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import BackendError, BundleError
from engines.graphs import DECODE, DENOISE, ID_ENCODER
from engines.openvino import OpenVinoEngine, precisions
from export.graphs import example_inputs

pytest.importorskip("openvino", reason="needs pip install 'anydoor-runtime[openvino]'")

SIZES = {"samples": 1, "rows": 1, "conditions": 1, "maps": 1}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def test_every_processor_computes_in_float32() -> None:
    assert "fp32" in precisions()


def test_bfloat16_runs_where_the_processor_has_it_and_is_refused_elsewhere(bundle: Bundle) -> None:
    inputs = example_inputs(bundle.manifest.specs[ID_ENCODER], SIZES)
    if "bf16" not in precisions():
        with pytest.raises(BackendError, match="no bf16 arithmetic: run with --inference-precision fp32"):
            open_engine(bundle, "cpu", backend="openvino", inference_precision="bf16")
        return
    exact, rounded = (
        open_engine(bundle, "cpu", backend="openvino", inference_precision=precision).run(ID_ENCODER, inputs)
        for precision in ("fp32", "bf16")
    )
    difference = np.linalg.norm(exact["tokens"] - rounded["tokens"]) / np.linalg.norm(exact["tokens"])
    assert 0 < difference < 0.1


def test_a_result_survives_the_next_call(bundle: Bundle) -> None:
    engine = open_engine(bundle, "cpu", backend="openvino")
    first, second = (example_inputs(bundle.manifest.specs[DECODE], SIZES, seed) for seed in (0, 1))
    picture = engine.run(DECODE, first, ["image"])["image"]
    before = engine.to_host(picture)
    engine.run(DECODE, second, ["image"])
    np.testing.assert_array_equal(engine.to_host(picture), before)


def test_inputs_that_have_to_be_copied_live_until_the_call_has_run(bundle: Bundle) -> None:
    """The library points into arrays without keeping them: copies of views must not be freed too early."""
    engine = open_engine(bundle, "cpu", backend="openvino")
    inputs = example_inputs(bundle.manifest.specs[DENOISE], SIZES)
    views = {
        name: np.repeat(array, 2, axis=-1)[..., ::2] if array.ndim else array
        for name, array in inputs.items()
    }
    assert any(not view.flags.c_contiguous for view in views.values())
    expected, found = engine.run(DENOISE, inputs), engine.run(DENOISE, views)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_number_of_threads_is_the_libraries(bundle: Bundle) -> None:
    engine = OpenVinoEngine(bundle, threads=1)
    engine.load(ID_ENCODER)
    compiled = engine._requests[ID_ENCODER].get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_graph_that_it_cannot_read(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    copy.verify(DECODE)
    copy.graph_file(DECODE).write_bytes(b"no graph")
    with pytest.raises(BundleError, match="OpenVINO cannot load the graph 'decode'"):
        open_engine(copy, "cpu", backend="openvino").load(DECODE)


def test_nvidia_cards_are_for_others(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="OpenVINO does not run on NVIDIA cards"):
        open_engine(bundle, "cuda", backend="openvino")


def test_neither_converters_nor_telemetry_are_imported(tiny_bundle: Path) -> None:
    code = (
        "import sys; from engines.bundle import Bundle; from engines.engine import open_engine;"
        f"open_engine(Bundle.open({str(tiny_bundle)!r}), 'cpu', backend='openvino').load('decode');"
        "print(sorted(name for name in sys.modules if 'telemetry' in name or 'ovc' in name))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""FP16 graphs, with every result rounded, against FP32: errors, headroom, and what stays in FP32."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from benchmarks.precision import HEADROOM, GraphExtremes, RunError, graph_extremes
from benchmarks.support.rounding import LARGEST_FP16, RoundingEngine, round_every_result
from benchmarks.support.similarity import psnr
from engines.bundle import Bundle
from engines.engine import Engine, open_engine
from engines.options import EngineOptions
from export.precision import InFloat32, keep_float32_layers
from export.verification import relative_error
from runtime import Compositor, Sampling
from runtime.diffusion.ddim import ddim_schedule
from runtime.parameters import sampling_parameters
from runtime.sampling.conditions import BankRows
from runtime.sampling.detail_maps import DetailMapCache, DetailMaps
from runtime.sampling.running_batch import LatentRow, RunningBatch, Sample
from runtime.systems.anydoor import DEFAULTS, AnyDoorConditions
from tests.support.anydoor import CONTROL, DECODE, DENOISE, GRAPHS, ID_ENCODER


def run_networks(bundle: Bundle, engine: Engine) -> dict[str, np.ndarray]:
    """Everything from a reference and a hint to a picture, in four steps with guidance."""
    manifest, constants = bundle.manifest, bundle.constants()
    rng = np.random.default_rng(5)
    reference = rng.random((1, 3, 224, 224), dtype=np.float32)
    hint = rng.uniform(-1, 1, (4, manifest.resolution, manifest.resolution)).astype(np.float32)
    noise = rng.standard_normal((1, *manifest.latent_shape), dtype=np.float32)
    tokens = engine.to_host(engine.run(ID_ENCODER, {"reference": reference})["tokens"])
    both = np.concatenate([tokens, constants["unconditional_tokens"]])
    schedule = ddim_schedule(constants["alphas_cumprod"], 4)
    maps = DetailMaps(engine, CONTROL, DetailMapCache(0), hint, both, schedule.timesteps.tolist(), 1)
    conditions = AnyDoorConditions(BankRows({"tokens": both}, 0, 1, on_host=True), maps)
    sampling = sampling_parameters(Sampling(steps=4), DEFAULTS)
    sample = Sample(conditions, schedule, sampling, LatentRow(engine.to_device(noise), 0, 1))
    batch = RunningBatch(engine, manifest.step)
    batch.samples = [sample]
    for _ in range(4):
        batch.step()
    assert sample.done, sample.error
    latent = batch.latents([sample])
    image = engine.run(DECODE, {"latent": latent}, ["image"])["image"]
    return {"tokens": tokens, "latent": engine.to_host(latent), "image": engine.to_host(image)}


@pytest.fixture(scope="module")
def half(tiny_half_bundle: Path) -> RoundingEngine:
    return RoundingEngine(Bundle.open(tiny_half_bundle))


def test_fp16_stays_close_to_fp32_from_end_to_end(
    tiny_bundle: Path, tiny_half_bundle: Path, half: RoundingEngine
) -> None:
    bundle = Bundle.open(tiny_bundle)
    expected = run_networks(bundle, open_engine(bundle, EngineOptions(device="cpu")))
    found = run_networks(Bundle.open(tiny_half_bundle), half)
    # rounded once, an FP16 number is off by 5e-4 at the most; dozens of layers and four steps add up
    assert 1e-4 < relative_error(found["tokens"], expected["tokens"]) < 3e-3
    assert 1e-4 < relative_error(found["latent"], expected["latent"]) < 1e-2
    assert psnr(found["image"], expected["image"], peak=255) > 45
    extremes = list(graph_extremes(half.extremes))
    assert [row.graph for row in extremes] == [ID_ENCODER, CONTROL, DENOISE, DECODE]
    assert all(row.passed and row.largest > 1 for row in extremes)


def test_only_normalisation_stays_in_fp32(tiny_half_bundle: Path) -> None:
    for graph in GRAPHS:
        model = onnx.shape_inference.infer_shapes(onnx.load(tiny_half_bundle / f"{graph}.onnx"))
        values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
        types = {v.name: v.type.tensor_type.elem_type for v in values}
        types |= {t.name: t.data_type for t in model.graph.initializer}
        of_kind = {
            kind: {types[node.input[0]] for node in model.graph.node if node.op_type in names}
            for kind, names in {
                "norm": ("LayerNormalization", "InstanceNormalization"),
                "heavy": ("Conv", "MatMul", "Softmax"),
            }.items()
        }
        assert of_kind["norm"] == {TensorProto.FLOAT}
        assert of_kind["heavy"] == {TensorProto.FLOAT16}


def test_a_layer_in_float32_does_not_overflow() -> None:
    """Activations of 300 are no problem for FP16, but their squares are."""
    module = nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.Sequential(nn.LayerNorm(4))).half()
    hidden = torch.randn(2, 8, 4, 4) * 300
    expected = nn.functional.group_norm(hidden, 2)
    keep_float32_layers(module)
    assert [type(layer) for layer in (module[0], module[1], module[2][0])] == [
        InFloat32,
        nn.Conv2d,
        InFloat32,
    ]
    found = module[0](hidden.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=2e-3)
    assert module[2](found).dtype == torch.float16


def half_graph(operators: list[tuple[str, list[str], str]], constant: float) -> onnx.ModelProto:
    """x (1,) and a constant c -> y, all in FP16."""
    value = helper.make_tensor(
        "c", TensorProto.FLOAT16, [1], np.array([constant], np.float16).tobytes(), True
    )
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(kind, inputs, [output]) for kind, inputs, output in operators],
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1])],
            [value],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )


def run_model(model: onnx.ModelProto, x: float) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.array([x], np.float16)})  # type: ignore[no-any-return]


def test_every_result_is_rounded() -> None:
    """1e-4 + 1 - 1: ONNX Runtime alone does not round in between, and hides what a card would show."""
    model = half_graph([("Add", ["x", "c"], "sum"), ("Sub", ["sum", "c"], "y")], 1.0)
    assert run_model(model, 1e-4)[0] == pytest.approx(1e-4, rel=1e-3)
    assert round_every_result(model) == ["extreme:sum", "extreme:y"]
    assert run_model(model, 1e-4)[0] == 0


def test_overflow_is_measured_before_it_happens() -> None:
    model = half_graph([("Mul", ["x", "c"], "product"), ("Div", ["product", "c"], "y")], 300.0)
    names = round_every_result(model)
    y, largest, _ = run_model(model, 400.0)
    assert np.isinf(y)
    row = GraphExtremes("graph", len(names), float(largest), "product")
    assert row.largest == 120_000
    assert row.headroom == pytest.approx(LARGEST_FP16 / 120_000)
    assert not row.passed


@pytest.mark.parametrize("largest", [math.nan, math.inf, LARGEST_FP16 / HEADROOM * 1.01])
def test_too_little_headroom_fails(largest: float) -> None:
    (row,) = graph_extremes({"decode": {"a": 1.0, "b": largest, "c": 2.0}})
    assert (row.where, row.passed) == ("b", False)
    assert "OUT" in row.row()


@pytest.mark.parametrize(
    "figures", [(1.0, 0.0, 99.0), (0.0, 0.1, 99.0), (0.0, 0.0, 20.0), (0.0, math.nan, 99.0)]
)
def test_a_run_out_of_tolerance_fails(figures: tuple[float, float, float]) -> None:
    assert RunError("case", 10, 1e-3, 1e-3, 60.0).passed
    assert not RunError("case", 10, *figures).passed


def test_the_engine_is_an_engine(tiny_half_bundle: Path, half: RoundingEngine) -> None:
    """The Compositor runs on it like on any other."""
    compositor = Compositor(Bundle.open(tiny_half_bundle), half)
    assert sorted(compositor.load_graphs()) == sorted(GRAPHS)

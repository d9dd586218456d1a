"""The graphs as they run: against PyTorch in every batch shape, and samples that share a call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engines.bundle import Bundle
from engines.engine import Array, Engine, open_engine
from engines.options import EngineOptions
from export.example_inputs import example_inputs
from export.systems.anydoor import GRAPH_MODULES, PARTS
from export.verification import output_error, relative_error
from tests.support.anydoor import CONTROL, DECODE, DENOISE, GRAPHS, ID_ENCODER
from training.network.checkpoint import read_checkpoint

SHAPES = [
    {"samples": 1, "rows": 1, "conditions": 1, "maps": 1},
    {"samples": 1, "rows": 2, "conditions": 2, "maps": 2},
    {"samples": 3, "rows": 5, "conditions": 2, "maps": 7},
]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine(bundle: Bundle, request: pytest.FixtureRequest) -> Engine:
    pytest.importorskip(request.param)
    return open_engine(bundle, EngineOptions(backend=request.param, device="cpu"))


def run(engine: Engine, graph: str, inputs: dict[str, Array]) -> dict[str, Array]:
    return {name: engine.to_host(tensor) for name, tensor in engine.run(graph, inputs).items()}


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("graph", GRAPHS)
def test_graph_computes_what_pytorch_computes(
    bundle: Bundle, engine: Engine, tiny_checkpoint: Path, graph: str, sizes: dict[str, int]
) -> None:
    spec = bundle.manifest.specs[graph]
    inputs = example_inputs(spec, sizes, seed=sizes["rows"])
    module = GRAPH_MODULES[graph](read_checkpoint(tiny_checkpoint).load_part(PARTS[graph]))
    with torch.no_grad():
        result = module(*(torch.from_numpy(array) for array in inputs.values()))
    expected = result if isinstance(result, tuple) else (result,)
    found = run(engine, graph, inputs)
    assert list(found) == [tensor.name for tensor in spec.outputs]
    for tensor, theirs in zip(spec.outputs, expected):
        assert found[tensor.name].shape == tensor.resolve(sizes)
        assert found[tensor.name].dtype == tensor.dtype
        assert output_error(found[tensor.name], theirs.numpy()) < 1e-4, tensor.name


def test_control_maps_do_not_depend_on_who_shares_the_call(bundle: Bundle, engine: Engine) -> None:
    inputs = example_inputs(bundle.manifest.specs[CONTROL], SHAPES[2])
    together = run(engine, CONTROL, inputs)
    for row in (0, 6):
        alone = run(
            engine,
            CONTROL,
            {
                "hint": inputs["hint"],
                "timestep": inputs["timestep"][row : row + 1],
                "tokens": inputs["tokens"][row : row + 1],
            },
        )
        for name, tensor in alone.items():
            assert relative_error(together[name][row : row + 1], tensor) < 1e-5


def test_samples_at_different_steps_share_a_call(bundle: Bundle, engine: Engine) -> None:
    """Three samples, one of them without guidance: the same as three calls."""
    inputs = example_inputs(bundle.manifest.specs[DENOISE], SHAPES[2], seed=3)
    inputs["conditional_row"] = np.array([0, 1, 2], np.int32)
    inputs["unconditional_row"] = np.array([3, 1, 4], np.int32)
    inputs["row_sample"] = np.array([0, 1, 2, 0, 2], np.int32)
    inputs["row_condition"] = np.array([0, 0, 0, 1, 1], np.int32)
    inputs["row_map"] = np.array([6, 5, 4, 3, 2], np.int32)
    together = run(engine, DENOISE, inputs)
    for sample in range(3):
        rows = np.flatnonzero(inputs["row_sample"] == sample)
        alone = dict(inputs)
        for name in ("latent", "carry", "timestep", "guidance_scale", "control_scale", "coefficients"):
            alone[name] = inputs[name][sample : sample + 1]
        alone["conditional_row"] = np.array([0], np.int32)
        alone["unconditional_row"] = np.array([len(rows) - 1], np.int32)
        alone["row_sample"] = np.zeros(len(rows), np.int32)
        for name in ("row_condition", "row_map"):
            alone[name] = inputs[name][rows]
        for name, tensor in run(engine, DENOISE, alone).items():
            assert relative_error(together[name][sample : sample + 1], tensor) < 1e-5


def test_guidance_has_no_effect_on_a_sample_with_one_row(bundle: Bundle, engine: Engine) -> None:
    inputs = example_inputs(bundle.manifest.specs[DENOISE], SHAPES[0])
    inputs["guidance_scale"] = np.array([1.0], np.float32)
    plain = run(engine, DENOISE, inputs)
    inputs["guidance_scale"] = np.array([7.5], np.float32)
    for name, tensor in run(engine, DENOISE, inputs).items():
        np.testing.assert_array_equal(tensor, plain[name])


def test_guidance_and_update_are_the_formulas(bundle: Bundle, engine: Engine) -> None:
    """Classifier-free guidance, then the linear update of `runtime.diffusion.ddim`."""
    inputs = example_inputs(bundle.manifest.specs[DENOISE], SHAPES[1], seed=1)
    inputs |= {
        "conditional_row": np.array([0], np.int32),
        "unconditional_row": np.array([1], np.int32),
        "row_condition": np.array([0, 1], np.int32),
        "row_map": np.array([0, 1], np.int32),
    }
    found = run(engine, DENOISE, inputs)
    halves = []
    for row in (0, 1):
        half = inputs | {
            "row_sample": np.zeros(1, np.int32),
            "unconditional_row": np.zeros(1, np.int32),
            "row_condition": np.array([row], np.int32),
            "row_map": np.array([row], np.int32),
        }
        halves.append(run(engine, DENOISE, half)["epsilon"])
    epsilon = halves[1] + inputs["guidance_scale"] * (halves[0] - halves[1])
    c = inputs["coefficients"][0]
    assert relative_error(found["epsilon"], epsilon) < 1e-5
    expected = c[0] * inputs["latent"] + c[1] * found["epsilon"] + c[2] * inputs["carry"]
    assert relative_error(found["next_latent"], expected) < 1e-6


def test_picture_is_the_decoded_one_in_256_levels(bundle: Bundle, engine: Engine) -> None:
    found = run(engine, DECODE, example_inputs(bundle.manifest.specs[DECODE], SHAPES[0]))
    levels = np.clip(found["decoded"] * 127.5 + 127.5, 0, 255).transpose(0, 2, 3, 1)
    assert np.abs(found["image"] - levels).max() <= 0.5 + 1e-3


def test_outputs_of_one_graph_feed_the_next_without_the_host(bundle: Bundle, engine: Engine) -> None:
    inputs = example_inputs(bundle.manifest.specs[ID_ENCODER], SHAPES[0])
    tokens = engine.run(ID_ENCODER, inputs)["tokens"]
    control = example_inputs(bundle.manifest.specs[CONTROL], SHAPES[0]) | {"tokens": tokens}
    on_device = engine.run(CONTROL, control)
    on_host = run(engine, CONTROL, control | {"tokens": engine.to_host(tokens)})
    for name, tensor in on_device.items():
        np.testing.assert_array_equal(engine.to_host(tensor), on_host[name])


def test_unloaded_graph_is_loaded_again_when_needed(bundle: Bundle, engine: Engine) -> None:
    inputs = example_inputs(bundle.manifest.specs[DECODE], SHAPES[0])
    before = run(engine, DECODE, inputs)
    engine.unload(DECODE)
    np.testing.assert_array_equal(run(engine, DECODE, inputs)["image"], before["image"])

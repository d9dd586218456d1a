"""The four graphs as PyTorch modules with the signatures of `engines.spec`, and their ONNX export."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.spec import CONTROL, DECODE, DENOISE, ID_ENCODER, GraphSpec, ModelShape, TensorSpec
from training.network.architecture import REFERENCE_SIZE, Architecture
from training.network.modules import AnyDoor

OPSET = 18

PART_OF_GRAPH = {ID_ENCODER: "id_encoder", CONTROL: "control", DENOISE: "unet", DECODE: "vae"}
"""Graph -> the part of `AnyDoor` whose weights it holds."""

EXAMPLE_SIZES = {"samples": 2, "rows": 3, "conditions": 4, "maps": 5}
"""Sizes to trace with. All differ and none is 1, so that the export takes no two dimensions for the same."""


class IDEncoderGraph(nn.Module):
    """Reference -> ID tokens."""

    dtype: torch.dtype

    def __init__(self, model: AnyDoor) -> None:
        super().__init__()
        self.model = model
        model.id_encoder.fix_positions(REFERENCE_SIZE)
        self.dtype = model.id_encoder.projector.weight.dtype

    def forward(self, reference: Tensor) -> Tensor:
        """(N, 3, 224, 224) in 0..1 -> (N, T, D)."""
        return self.model.encode_reference(reference.to(self.dtype)).float()


class ControlGraph(nn.Module):
    """Hint, timesteps, ID tokens -> detail maps, in the dtype of the weights."""

    dtype: torch.dtype

    def __init__(self, model: AnyDoor) -> None:
        super().__init__()
        self.model = model
        self.dtype = model.control.conv_in.weight.dtype

    def forward(self, hint: Tensor, timestep: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """(1, 4, H, W), (M,), (M, T, D) -> one (M, C, h, w) per skip connection, and one for the middle."""
        return self.model.detail_maps(hint.to(self.dtype), timestep, tokens.to(self.dtype))


class DenoiseGraph(nn.Module):
    """One step: UNet, classifier-free guidance and the DDIM update, for samples that share nothing.

    Rows are the UNet's batch. A sample without guidance names the same row as its conditional and its
    unconditional one, and the guidance term vanishes exactly. The update is done in float32.
    """

    dtype: torch.dtype

    def __init__(self, model: AnyDoor) -> None:
        super().__init__()
        self.model = model
        self.dtype = model.unet.conv_in.weight.dtype

    def forward(
        self,
        latent: Tensor,
        carry: Tensor,
        timestep: Tensor,
        guidance_scale: Tensor,
        control_scale: Tensor,
        coefficients: Tensor,
        conditional_row: Tensor,
        unconditional_row: Tensor,
        row_sample: Tensor,
        row_condition: Tensor,
        row_map: Tensor,
        tokens: Tensor,
        *details: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `engines.spec`; returns the next latent and the guided epsilon, both (N, C, h, w)."""
        row_scale = _per_sample(control_scale).index_select(0, row_sample)
        row_epsilon = self.model.predict_noise(
            latent.index_select(0, row_sample).to(self.dtype),
            timestep.index_select(0, row_sample),
            tokens.index_select(0, row_condition).to(self.dtype),
            [detail.index_select(0, row_map) * row_scale.to(detail.dtype) for detail in details],
        ).float()
        conditional = row_epsilon.index_select(0, conditional_row)
        unconditional = row_epsilon.index_select(0, unconditional_row)
        epsilon = unconditional + _per_sample(guidance_scale) * (conditional - unconditional)
        from_latent, from_epsilon, from_carry = coefficients.unbind(1)
        next_latent = (
            _per_sample(from_latent) * latent
            + _per_sample(from_epsilon) * epsilon
            + _per_sample(from_carry) * carry
        )
        return next_latent, epsilon


class DecodeGraph(nn.Module):
    """Latent -> picture."""

    dtype: torch.dtype

    def __init__(self, model: AnyDoor) -> None:
        super().__init__()
        self.model = model
        self.dtype = model.vae.post_quant_conv.weight.dtype

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(1, C, h, w) -> (1, H, W, 3) uint8 RGB, and the same before clipping, (1, 3, H, W) in -1..1."""
        decoded = self.model.decode(latent.to(self.dtype)).float()
        image = (decoded * 127.5 + 127.5).clamp(0, 255).round().permute(0, 2, 3, 1)
        # TensorRT knows uint8 at the border of a network only: nothing may follow the cast
        return image.to(torch.uint8), decoded


GRAPH_MODULES: Mapping[str, type[nn.Module]] = {
    ID_ENCODER: IDEncoderGraph,
    CONTROL: ControlGraph,
    DENOISE: DenoiseGraph,
    DECODE: DecodeGraph,
}


def model_shape(architecture: Architecture, resolution: int, detail_dtype: str = "float32") -> ModelShape:
    """The sizes that the signatures of the graphs depend on."""
    return ModelShape(
        resolution=resolution,
        latent_channels=architecture.latent_channels,
        latent_size=resolution // architecture.latent_factor,
        token_count=architecture.token_count,
        token_width=architecture.token_width,
        reference_size=REFERENCE_SIZE,
        detail_shapes=architecture.detail_shapes(resolution),
        detail_dtype=detail_dtype,
    )


def example_inputs(
    spec: GraphSpec, sizes: Mapping[str, int], seed: int = 0
) -> dict[str, NDArray[np.float32] | NDArray[np.int32]]:
    """Seeded inputs of plausible size: pictures in 0..1, timesteps in 0..999, the rest normal.

    Index inputs name valid rows, samples, conditions and maps.
    """
    rng = np.random.default_rng(seed)
    limits = {
        "conditional_row": sizes.get("rows", 1),
        "unconditional_row": sizes.get("rows", 1),
        "row_sample": sizes.get("samples", 1),
        "row_condition": sizes.get("conditions", 1),
        "row_map": sizes.get("maps", 1),
    }

    def draw(tensor: TensorSpec) -> NDArray[np.float32] | NDArray[np.int32]:
        shape = tensor.resolve(dict(sizes))
        if tensor.name in limits:
            return (np.arange(shape[0]) % limits[tensor.name]).astype(np.int32)
        if tensor.name == "timestep":
            return rng.integers(0, 1000, shape).astype(np.float32)
        if tensor.name == "reference":
            return rng.random(shape, dtype=np.float32)
        return rng.standard_normal(shape, dtype=np.float32).astype(tensor.dtype)

    return {tensor.name: draw(tensor) for tensor in spec.inputs}


def export_onnx(module: nn.Module, spec: GraphSpec, path: Path, opset: int = OPSET) -> None:
    """Writes a graph as ONNX, its weights beside it in `PATH.data`.

    Args:
        module: one of `GRAPH_MODULES`.
        spec: its signature.
        path: where to.
        opset: version of the ONNX operators.
    """
    inputs = example_inputs(spec, EXAMPLE_SIZES)
    arguments = tuple(torch.from_numpy(array) for array in inputs.values())
    dims = {name: torch.export.Dim(name, min=1) for name in EXAMPLE_SIZES}
    shapes = [
        {axis: dims[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    ]
    variadic = sum(tensor.name.startswith("detail_") for tensor in spec.inputs)
    named = len(shapes) - variadic
    dynamic = (*shapes[:named], tuple(shapes[named:])) if variadic else tuple(shapes)
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            module,
            arguments,
            path,
            dynamo=True,
            opset_version=opset,
            external_data=True,
            optimize=True,
            verify=False,
            verbose=False,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=dynamic,
        )


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's chatter out of the progress bars; what goes wrong is raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)

"""Defines Stable Diffusion's graphs: PyTorch modules and their signatures.

    prompt ---------------------------> [text_encoder] --> tokens
    scene ----------------------------> [encode] --------> its latent
    latent, tokens, scene, background > [denoise] -------> latent one step further
    latent ---------------------------> [decode] --------> picture

Every bundle can draw into a scene, and a model of 9 input channels looks at it, too. With a `blend` of 1
everywhere a model of 4 draws from nothing. Sources: Rombach et al., 2022; `StableDiffusionPipeline` and
`StableDiffusionInpaintPipeline` in diffusers.

Value ranges: `ids` of tokens; the others as in `export.systems.scene`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.bundle import sha256
from engines.engine import Engine
from engines.spec import SAMPLES, GraphSpec, TensorSpec
from export.options import SourceOptions
from export.output import printable
from export.precision import keep_float32_layers
from export.systems.diffusion import (
    CONDITIONS,
    DECODE,
    DENOISE,
    ENCODE,
    DecodeGraph,
    EncodeGraph,
    check_size,
    decode_spec,
    encode_spec,
    f32,
    latent_shape,
    without_masks,
)
from export.systems.scene import (
    DIMENSIONS,
    EXAMPLES,
    DenoiseGraph,
    blended_step_spec,
)
from export.systems.system import GraphExport, Size, checkpoint_record
from runtime.diffusion.noise_schedule import alphas_cumprod
from runtime.systems.tokenizer import TOKENS
from training.network.checkpoint_file import CheckpointError
from training.network.lora import merge_lora
from training.network.stable_diffusion import BUILDERS, StableDiffusion, StableDiffusionArchitecture
from training.network.stable_diffusion_checkpoint import (
    StableDiffusionCheckpoint,
    check_tokenizer,
    module_shapes,
    read_stable_diffusion,
)
from training.network.tokenizer_files import (
    installed_merges,
    made_up_tokenizer,
    read_merges,
    read_tokenizer,
    tokenizer_of,
)

TEXT_ENCODER = "text_encoder"

PARTS = {DENOISE: "unet", TEXT_ENCODER: "text_encoder", ENCODE: "vae", DECODE: "vae"}
"""Graph -> the part of `StableDiffusion` whose weights it holds."""


class StableDiffusionSource:
    """A Stable Diffusion checkpoint, ready for export; see `export.systems.system.ExportSource`."""

    system = "stable_diffusion"
    dimensions: Mapping[str, int] = DIMENSIONS
    defaults: Mapping[str, Any] = {}

    def __init__(self, checkpoint: StableDiffusionCheckpoint) -> None:
        """Takes a checkpoint.

        Raises:
            CheckpointError: it has no tokenizer, or one that does not fit its text encoder.
        """
        a = checkpoint.architecture
        if checkpoint.tokenizer is None:
            raise CheckpointError(
                f"'{checkpoint.path}' has no tokenizer: give the merges.txt of Stable Diffusion, or the "
                "folder of a tokenizer, with --tokenizer, or install open_clip_torch, which has it"
            )
        if a.text_positions != TOKENS:
            raise CheckpointError(
                f"the text encoder of '{checkpoint.path}' reads {a.text_positions} tokens, but prompts have "
                f"{TOKENS}"
            )
        self.path = checkpoint.path
        self.dtype = checkpoint.dtype
        self.size: Size | None = checkpoint.size
        self.tokenizer = checkpoint.tokenizer
        self.architecture: Mapping[str, Any] = asdict(a)
        self._checkpoint = checkpoint

    @classmethod
    def open(cls, path: Path, options: SourceOptions) -> StableDiffusionSource:
        """Opens a checkpoint, finds its tokenizer, and merges LoRA files into it.

        Raises:
            CheckpointError: it, or what goes with it, cannot be used.
            AnyDoorError: an option does not go with it.
        """
        options.require("Stable Diffusion", "ema", "variant", "prediction", "tokenizer", "lora")
        checkpoint = read_stable_diffusion(path, options.variant, options.prediction, bool(options.ema))
        checkpoint = with_tokenizer(checkpoint, options.tokenizer)
        for file, scale in options.lora or ():
            checkpoint = merge_lora(checkpoint, file, scale)
        return cls(checkpoint)

    @classmethod
    def without_weights(
        cls, architecture: StableDiffusionArchitecture, dtype: torch.dtype
    ) -> StableDiffusionSource:
        """Returns a network of any size whose weights are zeros that take no memory, to export skeletons
        from."""
        zero = torch.zeros((), dtype=dtype)
        parts = {
            part: {name: zero.expand(shape) for name, shape in module_shapes(part, architecture).items()}
            for part in BUILDERS
        }
        checkpoint = StableDiffusionCheckpoint(Path("without weights"), architecture, parts)
        tokenizer = made_up_tokenizer(architecture.text_vocabulary, checkpoint.pad)
        return cls(replace(checkpoint, tokenizer=tokenizer))

    @property
    def description(self) -> str:
        """What the checkpoint is."""
        return self._checkpoint.describe()

    def record(self) -> dict[str, Any]:
        """Returns name and sha256 of the checkpoint and of the LoRA files in it."""
        loras = [
            {"file": printable(path.name), "sha256": sha256(path), "scale": scale}
            for path, scale in self._checkpoint.loras
        ]
        record = checkpoint_record(self.path, self._checkpoint.files)
        return {**record, "loras": loras} if loras else record

    def check_size(self, size: Size) -> None:
        """Refuses a picture size that the network cannot halve often enough.

        Raises:
            AnyDoorError: it cannot.
        """
        check_size(self._checkpoint.architecture, size)

    def graphs(self, size: Size, precision: str) -> Sequence[GraphExport]:
        """Returns the four graphs, the largest first."""
        specs = graph_specs(self._checkpoint.architecture, size)
        return [GraphExport(spec, partial(self._load, name), EXAMPLES) for name, spec in specs.items()]

    def constants(self, engine: Engine) -> dict[str, NDArray[np.float32]]:
        """Returns the noise schedule, and the tokens (1, 77, D) of the empty prompt."""
        ids = np.array([self.tokenizer.open().encode("")], np.int32)
        tokens = engine.to_host(engine.run(TEXT_ENCODER, {"ids": ids})["tokens"])
        return {"unconditional_tokens": tokens, "alphas_cumprod": alphas_cumprod()}

    def _load(self, graph: str, dtype: torch.dtype) -> nn.Module:
        name = PARTS[graph]
        part = self._checkpoint.load_part(name, dtype)
        if dtype != torch.float32:
            keep_float32_layers(part)
        return GRAPH_MODULES[graph](StableDiffusion(self._checkpoint.architecture, {name: part})).eval()


def with_tokenizer(
    checkpoint: StableDiffusionCheckpoint, given: Path | None = None
) -> StableDiffusionCheckpoint:
    """Gives a checkpoint a tokenizer if it has none: the one that is given, or the installed one.

    Raises:
        CheckpointError: the tokenizer cannot be read, does not fit, or the checkpoint has its own.
    """
    if checkpoint.tokenizer is not None:
        if given is not None:
            raise CheckpointError(f"'{checkpoint.path}' has its own tokenizer: leave out --tokenizer")
        return checkpoint
    if given is None:
        merges = installed_merges()
        tokenizer = None if merges is None else tokenizer_of(merges, checkpoint.pad)
    elif given.is_dir():
        tokenizer = read_tokenizer(given / "tokenizer" if (given / "tokenizer").is_dir() else given)
    else:
        tokenizer = read_merges(given, checkpoint.pad)
    if tokenizer is not None:
        check_tokenizer(tokenizer, checkpoint.architecture, f"'{given or 'open_clip_torch'}'")
    return replace(checkpoint, tokenizer=tokenizer)


def graph_specs(architecture: StableDiffusionArchitecture, size: Size) -> dict[str, GraphSpec]:
    """Returns graph -> its signature.

    Args:
        architecture: sizes of the network.
        size: of the picture.
    """
    tokens = f32("tokens", CONDITIONS, architecture.text_positions, architecture.text_width)
    specs = (
        blended_step_spec(architecture, size, tokens),
        GraphSpec(
            TEXT_ENCODER,
            "condition",
            inputs=(TensorSpec("ids", "int32", (SAMPLES, architecture.text_positions)),),
            outputs=(f32("tokens", SAMPLES, *tokens.shape[1:]),),
        ),
        encode_spec(latent_shape(architecture, size), size),
        decode_spec(latent_shape(architecture, size), size),
    )
    return {spec.name: spec for spec in specs}


class TextEncoderGraph(nn.Module):
    """Encoded prompt -> tokens."""

    def __init__(self, model: StableDiffusion) -> None:
        super().__init__()
        self.model = model
        without_masks(model.text_encoder)

    def forward(self, ids: Tensor) -> Tensor:
        """Maps (N, 77) to (N, 77, D)."""
        return self.model.encode_prompt(ids).float()


GRAPH_MODULES: Mapping[str, type[nn.Module]] = {
    DENOISE: DenoiseGraph,
    TEXT_ENCODER: TextEncoderGraph,
    ENCODE: EncodeGraph,
    DECODE: DecodeGraph,
}

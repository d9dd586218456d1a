"""Sampling with the graphs of Stable Diffusion, below a compositor: of a bundle, or as PyTorch modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.engine import Array, Engine
from engines.spec import GraphSpec
from export.systems.stable_diffusion import ENCODE, GRAPH_MODULES, PARTS, TEXT_ENCODER, graph_specs
from runtime.diffusion.noise_schedule import alphas_cumprod
from runtime.diffusion.samplers import SAMPLERS
from runtime.parameters import SamplingParameters
from runtime.sampling.conditions import BankRows
from runtime.sampling.running_batch import LatentRow, RunningBatch, Sample
from runtime.systems.tokenizer import Tokenizer
from tests.support.module_engine import ModuleEngine
from training.network.stable_diffusion import StableDiffusion
from training.network.stable_diffusion_checkpoint import StableDiffusionCheckpoint

Floats = NDArray[np.float32]


def module_engine(checkpoint: StableDiffusionCheckpoint, size: tuple[int, int]) -> ModuleEngine:
    """The graphs of a checkpoint as PyTorch modules."""
    a = checkpoint.architecture
    network = StableDiffusion(a, {part: checkpoint.load_part(part) for part in set(PARTS.values())})
    specs = graph_specs(a, size)
    return ModuleEngine({graph: (specs[graph], GRAPH_MODULES[graph](network)) for graph in PARTS})


@dataclass(frozen=True, eq=False)
class TextConditions:
    """Tokens of two prompts, and a scene."""

    tokens: BankRows
    scene: BankRows
    steps: int

    def banks(self, step: int) -> Mapping[str, BankRows]:
        return {"tokens": self.tokens, "scene": self.scene}

    def steps_ready(self, step: int) -> int:
        return self.steps - step


def parameters(steps: int = 10, guidance_scale: float = 7.5, sampler: str = "ddim", eta: float = 0.0) -> Any:
    return SamplingParameters(steps, guidance_scale, None, eta, sampler, (0, 999), None, None)


def tokens_of(engine: Engine, tokenizer: Tokenizer, *prompts: str) -> Floats:
    """(N, 77, D)."""
    ids = np.array([tokenizer.encode(prompt) for prompt in prompts], np.int32)
    return engine.to_host(engine.run(TEXT_ENCODER, {"ids": ids})["tokens"])


def scene_of(engine: Engine, spec: GraphSpec, picture: Floats, mask: Floats) -> dict[str, Floats]:
    """The bank `scene`: what the networks see of a picture (1, 3, H, W) in -1..1, drawn where a mask
    (1, 1, H, W) is 1."""
    height, width = spec.tensor("blend").shape[2:]
    factor = picture.shape[2] // int(height)
    small = np.ascontiguousarray(mask[:, :, ::factor, ::factor])
    assert small.shape == (1, 1, height, width)

    def latent(of: Floats) -> Floats:
        return engine.to_host(engine.run(ENCODE, {"picture": of})["latent"])

    scene = {"background": latent(picture), "blend": small}
    if len(spec.banks[1].tensors) == 3:
        # a model that sees the scene is not blended, as in diffusers
        scene |= {"blend": np.ones_like(small)}
        scene |= {"scene": np.concatenate([small, latent(picture * (mask < 0.5))], axis=1)}
    return scene


def blank_scene(spec: GraphSpec) -> dict[str, Floats]:
    """The scene of a model that draws from nothing."""
    shapes = {
        tensor.name: tensor.resolve({"scenes": 1}) for tensor in spec.inputs if "scenes" in tensor.shape
    }
    return {
        name: (np.ones if name == "blend" else np.zeros)(shape, np.float32) for name, shape in shapes.items()
    }


def start(
    engine: Engine, latent: Floats, tokens: Floats, scene: Mapping[str, Array], sampling: SamplingParameters
) -> Sample:
    """A sample at its first step; `tokens` of the prompt and of the negative one."""
    schedule = SAMPLERS[sampling.sampler](alphas_cumprod(), sampling.steps, sampling.eta, None)
    conditions = TextConditions(
        BankRows({"tokens": tokens}, 0, len(tokens) - 1, on_host=True),
        BankRows(scene, 0, 0, on_host=True),
        schedule.steps,
    )
    generator = np.random.default_rng(1)
    return Sample(conditions, schedule, sampling, LatentRow(engine.to_device(latent), 0, 1), generator)


def finish(engine: Engine, spec: GraphSpec, samples: Sequence[Sample]) -> list[Floats]:
    """Takes all steps, each sample from where it is; gives the latents, each (1, C, h, w)."""
    batch = RunningBatch(engine, spec)
    while running := [sample for sample in samples if not sample.done]:
        batch.samples = running
        # one at a time is the call of a server; several at once that of a single request
        batch.step(batch.steps_alike() if len(samples) > 1 else 1)
        for sample in running:
            if sample.error:
                raise sample.error
    return [engine.to_host(batch.latents([sample])) for sample in samples]

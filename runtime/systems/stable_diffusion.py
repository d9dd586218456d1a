"""Implements Stable Diffusion and models tuned from it, like DreamBooth: a prompt conditions what is drawn,
with or without a scene.

Sources: Rombach et al., 2022; DreamBooth (Ruiz et al., 2023); diffusers' `StableDiffusionPipeline` and
`StableDiffusionInpaintPipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.presets import EXACT
from runtime.errors import in_field
from runtime.parameters import PlacementParameters
from runtime.request import Placement
from runtime.result import Stopwatch
from runtime.sampling.remembered import Remembered
from runtime.systems.inpainting import Inpainting
from runtime.systems.system import Model
from runtime.systems.tokenizer import open_tokenizer
from runtime.validation import Abilities, Limits

TEXT_ENCODER = "text_encoder"

DEFAULTS: Mapping[str, Any] = {
    "steps": 50,
    "guidance_scale": 7.5,
    "eta": 0.0,
    "sampler": "ddim",
    "guidance_interval": (0, 999),
    "timesteps": None,
    "mode": "keep_background",
    "mask_level": "exact",
    "box_ratio": 1.1,
    "crop_ratio": 2.0,
}
"""Steps and guidance scale of diffusers' pipelines; the ratios are those of AnyDoor."""

ABILITIES = Abilities("Stable Diffusion", "text", DEFAULTS, [EXACT, "balanced"])
"""The preset "fast" is not four times as fast as exact: there are no detail maps to save."""

_KEPT_PROMPTS = 64
"""Prompts whose tokens are remembered; 300 KB each at full size."""

Ids = tuple[int, ...]
"""An encoded prompt."""


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts."""

    prompt: Ids
    negative_prompt: Ids | None
    """None: guidance leads away from the empty prompt."""


class StableDiffusion(Inpainting[Prompts]):
    """The system with a model; see `runtime.systems.system.System`."""

    abilities = ABILITIES
    defaults = DEFAULTS

    def __init__(self, model: Model) -> None:
        """Looks up what the model has, and reads its tokenizer.

        Raises:
            BundleError: a graph or the tokenizer is missing, or the tokenizer is damaged.
        """
        super().__init__(model, TEXT_ENCODER)
        self._engine = model.engine
        self._tokenizer = open_tokenizer(model.bundle)
        self._no_prompt = model.constants["unconditional_tokens"]
        self._tokens = Remembered[Ids, NDArray[np.float32]](_KEPT_PROMPTS)

    def read(
        self, placement: Placement, parameters: PlacementParameters, limits: Limits, watch: Stopwatch
    ) -> Prompts:
        """Encodes the prompts.

        Raises:
            InputError: one cannot be used.
        """
        prompt = self._encode_prompt("prompt", placement.prompt)
        assert prompt is not None
        return Prompts(prompt, self._encode_prompt("negative_prompt", placement.negative_prompt))

    def tokens(self, what: Prompts, watch: Stopwatch) -> NDArray[np.float32]:
        """Returns the prompt's, (1, 77, D)."""
        return self._encode(what.prompt, watch)

    def unconditional_tokens(self, what: Prompts, watch: Stopwatch) -> NDArray[np.float32]:
        """Returns the negative prompt's, (1, 77, D)."""
        away = what.negative_prompt
        return self._no_prompt if away is None else self._encode(away, watch)

    @property
    def kept_tokens(self) -> Remembered[Any, Any]:
        """Tokens that are remembered."""
        return self._tokens

    def _encode_prompt(self, name: str, prompt: str | None) -> Ids | None:
        with in_field(name):
            return None if prompt is None else tuple(self._tokenizer.encode(prompt))

    def _encode(self, ids: Ids, watch: Stopwatch) -> NDArray[np.float32]:
        """Returns tokens of an encoded prompt, (1, 77, D)."""

        def compute() -> NDArray[np.float32]:
            with watch.measure("condition"):
                outputs = self._engine.run(TEXT_ENCODER, {"ids": np.array([ids], np.int32)})
                return self._engine.to_host(outputs["tokens"])

        return self._tokens.get(ids, compute)


def create(model: Model) -> StableDiffusion:
    """Returns the system at work with a model."""
    return StableDiffusion(model)

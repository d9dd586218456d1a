"""Trains DreamBooth: fine-tunes a model on a few pictures of a subject, with prior preservation of its class.

All layers of the UNet, and the text encoder, learn to draw the subject for "a IDENTIFIER CLASS"; beside each
picture of it stands one of its class, which the model drew for "a CLASS" before it was tuned. Source:
DreamBooth (Ruiz et al., CVPR 2023), section 3, equation 2, for the noise instead of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from engines.files import replacing, write_text
from runtime.errors import InputError
from runtime.progress_bar import ProgressBar
from runtime.systems.tokenizer import Tokenizer
from training import seeds
from training.data.pairs import Picture
from training.data.subject import (
    LEAST_PICTURES,
    SubjectError,
    SubjectSamples,
    class_paths,
    read_class,
    read_pictures,
)
from training.loop import Batch, NumberedDataset
from training.loop_settings import LoopSettings
from training.network.architecture import LATENT_SCALE
from training.network.low_rank import ATTENTION, add_low_rank
from training.network.stable_diffusion import BUILDERS, StableDiffusion
from training.network.weights_hash import hash_weights
from training.ranges import check_least
from training.systems.anydoor import error_weights, noisy_latents
from training.systems.stable_diffusion import (
    GUIDANCE_SCALE,
    STEPS,
    Learner,
    PromptPreview,
    draw_pictures,
    encode_scene,
)

NOTE = ".drawn.txt"
"""Beside the pictures of a class: how they were drawn."""


@dataclass(frozen=True, kw_only=True)
class SubjectSettings(LoopSettings):
    """A subject, and how it is learned. The defaults are the usual ones for Stable Diffusion."""

    steps: int = 1000
    batch: int = 1
    learning_rate: float = 2e-6
    save_every: int = 200
    draw_every: int = 200
    pictures: str
    """Folder of its pictures."""
    class_noun: str = field(metadata={"key": "class"})
    """What it is: a noun, like cup."""
    noun: bool = True
    """Whether the subject's name ends with the class; the paper compares with names that do not."""
    identifier: str
    """A word for this one, rare in the model's vocabulary; see `training.rare_tokens`."""
    class_images: int = 200
    """Pictures of the class that are drawn before training."""
    prior_weight: float = 1.0
    """Weight of the loss on these; 0 is plain fine-tuning, and draws none."""
    text_encoder: bool = True
    """Whether the text encoder learns as well."""
    rank: int = 0
    """Rank of low-rank updates of the attentions' projections; 0 trains all layers instead."""
    resolution: int = 512
    """Side of the pictures, in pixels."""
    guidance_scale: float = GUIDANCE_SCALE
    """Guidance scale of drawn pictures: those of the class, and previews."""
    previews: int = 4
    """Pictures of each prompt in a sheet of samples; 0 draws no sheets."""
    checkpointing: bool = True
    """Compute activations twice instead of keeping them: less memory, a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "rank", "prior_weight", "class_images", "previews", "guidance_scale")
        check_least(self, 1, "resolution")
        for name in ("class_noun", "identifier"):
            if not getattr(self, name).strip():
                key = name.removesuffix("_noun")
                raise InputError(f"{key} is empty: the subject is called 'a IDENTIFIER CLASS'")
        if self.has_prior:
            check_least(self, LEAST_PICTURES, "class_images")

    @property
    def prompt(self) -> str:
        """What the subject's pictures are called."""
        return f"a {self.identifier} {self.class_noun}" if self.noun else f"a {self.identifier}"

    @property
    def class_prompt(self) -> str:
        """What those of its class are called."""
        return f"a {self.class_noun}"

    @property
    def has_prior(self) -> bool:
        """Whether pictures of the class are learned from."""
        return self.prior_weight > 0

    def describe(self) -> str:
        """Says what is learned from what."""
        what = f"updates of rank {self.rank} in" if self.rank else "all layers of"
        parts = "UNet and text encoder" if self.text_encoder else "the UNet"
        prior = f"{self.class_images} pictures of '{self.class_prompt}'" if self.has_prior else "no prior"
        return f"'{self.prompt}' from the pictures in {self.pictures}, beside {prior}; {what} {parts} learn"


def choose_learning(network: StableDiffusion, settings: SubjectSettings) -> None:
    """Sets what learns: all layers of the UNet and the text encoder, or low-rank updates of them."""
    if settings.checkpointing:
        network.unet.enable_gradient_checkpointing()
        encoder: Any = network.text_encoder  # transformers renamed the method
        getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)()
        if not encoder.config.attention_dropout:
            encoder.train()  # transformers computes twice in this mode alone, which changes nothing else here
    network.requires_grad_(False)
    learning = ("unet", "text_encoder") if settings.text_encoder else ("unet",)
    for index, part in enumerate(learning):
        module = getattr(network, part)
        if settings.rank:
            add_low_rank(module, ATTENTION[part], settings.rank, seed=index)
        else:
            module.requires_grad_(True)


class SubjectTask:
    """Mean squared error of the noise in pictures of the subject, and in those of its class."""

    def __init__(self, network: StableDiffusion, samples: NumberedDataset, settings: SubjectSettings) -> None:
        """Makes the network ready to learn.

        Args:
            network: with its three parts; is trained in place.
            samples: see `SubjectSamples`.
            settings: what learns, and the weight of the class.
        """
        choose_learning(network, settings)
        self.module = Learner(network)
        self.network, self._samples = network, samples
        self._shares = (1.0, settings.prior_weight) if settings.has_prior else (1.0,)

    def dataset(self) -> NumberedDataset:
        """Gives the samples."""
        return self._samples

    def loss(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss of a batch of `SubjectSamples`, whose arrays are (N, K, ...)."""
        latents, noise, timestep, ids = (
            batch[name].flatten(0, 1) for name in ("latents", "noise", "timestep", "ids")
        )
        noisy = noisy_latents(latents, noise, timestep, self.network.alphas_cumprod)
        estimate = module(noisy, timestep, ids, self._scene(batch))
        error = error_weights(self.network, timestep) * (estimate.float() - noise).square().mean((1, 2, 3))
        by_kind = error.view(batch["timestep"].shape).mean(0)
        shown = dict(zip(("subject", "class"), by_kind.detach()))
        loss = torch.stack([share * each for share, each in zip(self._shares, by_kind)]).sum()
        return {"loss": loss, **shown}

    def _scene(self, batch: Batch) -> list[Tensor]:
        """Returns the scene that an inpainting model sees, (N, 1 + C, h, w)."""
        if "mask" not in batch:
            return []
        mask, surroundings = (batch[name].flatten(0, 1) for name in ("mask", "surroundings"))
        return [encode_scene(self.network, mask, surroundings)]


# --- what it learns from ----------------------------------------------------------------------------------


def make_samples(
    network: StableDiffusion, tokenizer: Tokenizer, settings: SubjectSettings, prior: Path
) -> SubjectSamples:
    """Reads and encodes the pictures of the subject, and those of its class, if it has a prior.

    Args:
        network: encodes them.
        tokenizer: encodes their prompts.
        settings: which they are.
        prior: folder of the pictures of the class, see `draw_class`.

    Raises:
        SubjectError, InputError: a picture, or a prompt, cannot be used; or pictures of the class are not
            drawn, or were drawn otherwise.
    """
    pictures = {settings.prompt: read_pictures(Path(settings.pictures), settings.resolution)}
    if settings.has_prior:
        check_drawn(prior, how_drawn(network, settings))
        pictures[settings.class_prompt] = read_class(prior, settings.class_images, settings.resolution)
    ids = np.array([tokenizer.encode(prompt) for prompt in pictures], np.int64)
    moments = [encode_moments(network, of_kind) for of_kind in pictures.values()]
    inpaints = network.unet.config.in_channels > network.vae.config.latent_channels
    return SubjectSamples(moments, ids, seeds.SUBJECT_PICTURES, list(pictures.values()) if inpaints else None)


@torch.no_grad()
def encode_moments(network: StableDiffusion, pictures: Sequence[Picture]) -> NDArray[np.float32]:
    """Encodes pictures (R, R, 3): mean and standard deviation of their scaled latents, (N, 2, C, h, w)."""
    moments = []
    for picture in ProgressBar(pictures, desc="encoding pictures", leave=False):
        values = torch.from_numpy(picture.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
        posterior = network.encode(values[None])
        moments.append(torch.cat([posterior.mean, posterior.std]) * LATENT_SCALE)
    return torch.stack(moments).numpy()


def how_drawn(network: StableDiffusion, settings: SubjectSettings) -> str:
    """Says what the pictures of the class depend on, a line each."""
    start = hash_weights(getattr(network, part) for part in BUILDERS)
    said = (
        f"the prompt '{settings.class_prompt}'",
        f"the resolution {settings.resolution}",
        f"the guidance_scale {settings.guidance_scale:g}",
        f"a start of the hash {start[:16]}",
    )
    return "\n".join(said)


def check_drawn(folder: Path, wanted: str) -> None:
    """Refuses pictures of the class that were drawn otherwise; those without a note are taken as they are.

    Args:
        folder: of the pictures.
        wanted: how they should be drawn, see `how_drawn`.

    Raises:
        SubjectError: says what differs.
    """
    note = folder / NOTE
    if not note.exists() or not any(folder.glob("*.png")):
        return
    found = note.read_text("utf-8", "replace").splitlines()
    if other := [line for line in wanted.splitlines() if line not in found]:
        raise SubjectError(
            f"the pictures in '{folder}' were not drawn with {', '.join(other)}: delete the folder to draw "
            "them anew, or give another --folder"
        )


def draw_class(
    network: StableDiffusion,
    tokenizer: Tokenizer,
    settings: SubjectSettings,
    folder: Path,
    steps: int = STEPS,
) -> None:
    """Draws the pictures of the class that are not drawn yet, as PNG: number n with the seed n.

    Args:
        network: as it is before it is tuned. An inpainting model draws into an empty scene.
        tokenizer: encodes the prompts.
        settings: class, and how many.
        folder: of the pictures; is made if it is not there.
        steps: of sampling.

    Raises:
        SubjectError: those that are there were drawn otherwise.
    """
    note = how_drawn(network, settings)
    check_drawn(folder, note)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / NOTE, note)
    paths = class_paths(folder, settings.class_images)
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    how = (settings.resolution, steps, settings.guidance_scale)
    drawn = draw_pictures(network, tokenizer, settings.class_prompt, missing, *how)
    bar = ProgressBar(zip(missing, drawn), desc=settings.class_prompt, total=len(missing))
    for number, picture in bar:
        with replacing(paths[number]) as partial:
            Image.fromarray(picture).save(partial, "PNG")


def make_preview(
    network: StableDiffusion, tokenizer: Tokenizer, settings: SubjectSettings, steps: int = 20
) -> PromptPreview:
    """Makes what draws sheets of the subject and of its class."""
    prompts = (settings.prompt, f"{settings.prompt} in the snow", settings.class_prompt)
    how = (settings.previews, settings.resolution, settings.guidance_scale, steps)
    return PromptPreview(network, tokenizer, prompts, *how)

"""Trains stage 3, the only one of the published model: denoising with a reference and a hint (equation 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from runtime.errors import InputError
from training.loop import AnyDataset, Batch
from training.network.architecture import LATENT_SCALE
from training.network.modules import AnyDoor, DiffusionNetwork
from training.ranges import check_least, check_shares
from training.small.attention_guide import AttentionGuide, check_guided_heads


@dataclass(frozen=True)
class Denoising:
    """What learns, and how. The defaults are section 4.1's: detail extractor, UNet decoder and projector."""

    control: bool = True
    unet_encoder: bool = False
    unet_decoder: bool = True
    projector: bool = True
    drop: float = 0.0
    """Probability of a black reference, for classifier-free guidance; the released code has none."""
    hint_block: bool = True
    """Whether the ControlNet's hint block learns as well. If not, hints are taken through it once, before
    training (`encode_hints`): it works at full resolution and costs as much as the rest together."""
    attention_guide: float = 0.0
    """Weight of a second loss, for small models and encoded pairs: see `training.small.attention_guide`."""
    guided_heads: int = 1
    """Heads of each cross-attention that it guides: 1 or 4."""
    place_keys: bool = False
    """Whether these heads start with keys that tell the places of the ID tokens: see
    `training.small.place_keys`."""
    checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""

    def __post_init__(self) -> None:
        """Refuses numbers that no training can have.

        Raises:
            InputError: names the setting.
        """
        check_shares(self, "drop")
        check_least(self, 0, "attention_guide")
        check_guided_heads(self.guided_heads)
        if self.place_keys and not self.attention_guide:
            raise InputError("place_keys needs an attention_guide above 0, whose heads start with them")

    def apply(self, model: AnyDoor) -> None:
        """Sets `requires_grad` of every weight; the autoencoder and DINOv2 never learn here."""
        if self.checkpointing:
            model.unet.enable_gradient_checkpointing()
            model.control.enable_gradient_checkpointing()
        model.requires_grad_(False)
        model.control.requires_grad_(self.control)
        # in every official checkpoint, and never used
        model.control.conv_in.requires_grad_(False)
        if not self.hint_block:
            model.control.controlnet_cond_embedding.requires_grad_(False)
            model.control.controlnet_cond_embedding.conv_out.requires_grad_(self.control)
        for name, weight in model.unet.named_parameters():
            decoder = name.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))
            weight.requires_grad_(self.unet_decoder if decoder else self.unet_encoder)
        model.id_encoder.projector.requires_grad_(self.projector)


def guided_parts(model: AnyDoor) -> tuple[nn.Module, ...]:
    """Returns the parts whose attention is guided: those that see the hint, and so where the box is."""
    return model.unet.up_blocks, model.control


class Denoiser(nn.Module):
    """The parts that learn, as one module with one forward pass (which DDP needs)."""

    def __init__(self, model: AnyDoor, guided: int = 0) -> None:
        """Takes the parts of a network; `guided` heads of each cross-attention are guided."""
        super().__init__()
        self.unet, self.control, self.projector = model.unet, model.control, model.id_encoder.projector
        # a plain reference, so that the network is not a second owner of these weights
        self._call = model.forward
        self._guide = AttentionGuide(guided_parts(model), guided) if guided else None

    def forward(
        self, latent: Tensor, timestep: Tensor, features: Tensor, hint: Tensor, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Estimates the noise in `latent`, and computes how far off the attention looks.

        `features` are DINOv2's, before the projector. The second is 0 unless the module is guided.
        """
        tokens = self.projector(features)
        if self._guide is None or places is None:
            return self._call(latent, timestep, tokens, hint), latent.new_zeros(())
        self._guide.clear()
        estimate: Tensor = self._call(latent, timestep, tokens, hint)
        return estimate, self._guide.loss(places)


def noisy_latents(latents: Tensor, noise: Tensor, timestep: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Adds noise: sqrt(a_t) latents + sqrt(1 - a_t) noise, with one timestep (N,) per sample."""
    signal = alphas_cumprod[timestep].view(-1, 1, 1, 1)
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def error_weights(network: DiffusionNetwork, timestep: Tensor) -> Tensor:
    """Gives what an error of the noise counts, (N,), so that it is one of what the UNet predicts.

    An error of the noise is sqrt(a_t) times the error of v that it comes from.
    """
    signal = network.alphas_cumprod[timestep]
    return torch.ones_like(signal) if network.prediction == "epsilon" else 1 / signal


class DiffusionTask:
    """Mean squared error of what the UNet predicts.

    As in the released code, whose logvar is 0 and which has no variational term.
    """

    def __init__(self, model: AnyDoor, pairs: AnyDataset, rules: Denoising) -> None:
        rules.apply(model)
        self.module = Denoiser(model, rules.guided_heads if rules.attention_guide else 0)
        self._guide_weight = rules.attention_guide
        self.network = model
        self._data = pairs

    def dataset(self) -> AnyDataset:
        """Gives pairs, encoded or not."""
        return self._data

    @staticmethod
    def load(model: AnyDoor, weights: Mapping[str, Tensor]) -> None:
        """Puts what this task trained into a network."""
        Denoiser(model).load_state_dict(weights)

    def loss(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss of a batch of `EncodedPairs` or of `Mixture`.

        It has latents, noise, timestep, features and hint, or the pictures that they are made of.
        """
        if "picture" in batch:
            batch = self.encoded(batch)
        network, timestep = self.network, batch["timestep"]
        noisy = noisy_latents(batch["latents"], batch["noise"], timestep, network.alphas_cumprod)
        inputs = (batch[name] for name in ("timestep", "features", "hint"))
        estimate, guide = module(noisy, *inputs, batch.get("places"))
        error = F.mse_loss(estimate.float(), batch["noise"], reduction="none").mean((1, 2, 3))
        denoising = (error_weights(network, timestep) * error).mean()
        shown = {"noise": error.detach().mean()}
        if self._guide_weight:
            shown |= {"denoising": denoising.detach(), "guide": guide.detach()}
        return {"loss": denoising + self._guide_weight * guide, **shown}

    @torch.no_grad()
    def encoded(self, batch: Batch) -> Batch:
        """Encodes the pictures of a batch: adds latents, a sample of the posterior, and features."""
        model = self.network.to(batch["picture"].device)
        posterior = model.encode(batch["picture"])
        latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * LATENT_SCALE
        return {**batch, "latents": latents, "features": model.id_encoder.features(batch["reference"])}

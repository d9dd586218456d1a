"""Losses and their gradients compute where the network is, as a step must that a card captures.

The device is PyTorch's "meta", which has shapes and no numbers, so this needs no card: whoever reads a
number, picks by a mask, or mixes devices fails there, as it would while a card captures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.imprint import TINY_IMPRINT, tiny_imprint
from tests.support.tiny import TINY, RandomPairs
from training.data.pairs import PairRules
from training.loop import Task, join_processes
from training.network.modules import AnyDoor, build_control
from training.network.stable_diffusion import BUILDERS, StableDiffusion, StableDiffusionArchitecture
from training.small.hint_block import HintBlockTask
from training.systems.anydoor import Denoising, DiffusionTask
from training.systems.autoencoder import AutoencoderTask
from training.systems.identity import IdentityTask
from training.systems.imprint import CompositingSettings, ImprintTask, ViewsSettings
from training.systems.stable_diffusion import PromptTask

FROM_THE_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor)


class _NoNumbersFromTheHost(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        assert function not in FROM_THE_HOST, f"{function.__name__} copies from the host"
        return function(*arguments, **(named or {}))


class _NoTensorsOnTheHost(TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        found = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
        assert all(tensor.is_meta for tensor in found), f"{operator} takes a tensor on the host"
        return operator(*arguments, **(named or {}))


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    with _NoNumbersFromTheHost(), _NoTensorsOnTheHost():
        yield


@pytest.mark.parametrize(
    "waits",
    [
        lambda values: values + torch.ones(3),
        lambda values: torch.ones(3).to(values.device),
        lambda values: values.new_tensor([1.0, 2.0, 3.0]),
        lambda values: values[values > 0],
        lambda values: values.sum().item(),
    ],
    ids=["mixing devices", "moving", "numbers", "picking by a mask", "reading a number"],
)
def test_what_waits_for_the_host_is_found(waits: Callable[[Tensor], Any]) -> None:
    values = torch.ones(3, device="meta")
    with one_device(), pytest.raises(REFUSALS):
        waits(values)


REFUSALS = (AssertionError, RuntimeError, NotImplementedError, AttributeError)
"""What PyTorch raises where a meta tensor has no values; it depends on what was imported."""

NO_STORE: Any = None  # only losses are asked for

HINTS = {"hint": torch.zeros(2, 4, 32, 32), "latents": torch.zeros(2, 4, 4, 4)}


def noisy() -> dict[str, Tensor]:
    """What all losses of diffusion take, for two samples."""
    shape = (2, 4, 4, 4)
    return {
        "timestep": torch.zeros(2, dtype=torch.long),
        "noise": torch.zeros(shape),
        "posterior_noise": torch.zeros(shape),
        "moments": torch.zeros(2, 2, *shape[1:]),
        "places": torch.zeros(2, 4, 4, 2),
    }


def anydoor(guided_heads: int = 1) -> tuple[Task, Mapping[str, Tensor]]:
    rules = Denoising(attention_guide=0.1, guided_heads=guided_heads)
    task = DiffusionTask(AnyDoor(replace(TINY, unet_head_width=16)), RandomPairs(), rules)
    return task, noisy() | HINTS | {"features": torch.zeros(2, 257, 64)}


def imprint(backbone: bool, guided_heads: int = 1) -> tuple[Task, Mapping[str, Tensor]]:
    stage = ViewsSettings if backbone else CompositingSettings
    settings = stage(steps=1, attention_guide=0.1, guided_heads=guided_heads)
    seen = {"reference": torch.zeros(2, 3, 224, 224)} if backbone else {"features": torch.zeros(2, 257, 64)}
    batch = {"dropped": torch.zeros(2), "scene": torch.zeros(2, 5, 4, 4), "counts": torch.zeros(2, 1, 4, 4)}
    model = tiny_imprint(replace(TINY_IMPRINT, unet_head_width=16))
    return ImprintTask(model, RandomPairs(), settings), noisy() | batch | seen


def anydoor_of_pictures() -> tuple[Task, Mapping[str, Tensor]]:
    task = DiffusionTask(AnyDoor(TINY), RandomPairs(), Denoising())
    pictures = {"picture": torch.zeros(2, 3, 32, 32), "reference": torch.zeros(2, 3, 224, 224)}
    return task, noisy() | pictures | {"hint": HINTS["hint"]}


def stable_diffusion() -> tuple[Task, Mapping[str, Tensor]]:
    sizes = StableDiffusionArchitecture(
        unet_channels=(32, 64),
        unet_attention=(False, True),
        unet_layers=1,
        unet_head_width=32,
        unet_norm_groups=8,
        token_width=32,
        vae_channels=(32, 32),
        vae_layers=1,
        text_encoder="clip",
        text_width=32,
        text_layers=1,
        text_heads=2,
        text_mlp_width=64,
        text_vocabulary=64,
        prediction="v",
    )
    network = StableDiffusion(sizes, {part: build(sizes) for part, build in BUILDERS.items()})
    return PromptTask(network, RandomPairs()), noisy() | {"ids": torch.zeros(2, 77, dtype=torch.long)}


TASKS: Mapping[str, Callable[[], tuple[Task, Mapping[str, Tensor]]]] = {
    "anydoor": anydoor,
    "anydoor with four guided heads": lambda: anydoor(guided_heads=4),
    "anydoor of pictures": anydoor_of_pictures,
    "imprint views": lambda: imprint(backbone=True),
    "imprint compositing": lambda: imprint(backbone=False),
    "imprint with four guided heads": lambda: imprint(backbone=False, guided_heads=4),
    "stable diffusion": stable_diffusion,
    "autoencoder": lambda: (AutoencoderTask(TINY, NO_STORE, 32), {"picture": torch.zeros(2, 3, 32, 32)}),
    "identity": lambda: (
        IdentityTask(TINY, NO_STORE, PairRules()),
        {"views": torch.zeros(2, 2, 3, 224, 224)},
    ),
    "hint block": lambda: (HintBlockTask(build_control(TINY), RandomPairs()), noisy() | HINTS),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_loss_and_its_gradients_compute_on_one_device(name: str) -> None:
    task, batch = TASKS[name]()
    task.network.to("meta")
    batch = {key: value.to("meta") for key, value in batch.items()}
    with one_device():
        losses = task.loss(task.module, batch)
        losses["loss"].backward()
    assert all(loss.is_meta and not loss.shape for loss in losses.values())
    learned = [weight for weight in task.module.parameters() if weight.requires_grad]
    assert learned
    assert all(weight.grad is not None for weight in learned)


@pytest.mark.parametrize("name", TASKS)
def test_losses_and_gradients_are_fp32_where_the_network_computes_in_bf16(name: str) -> None:
    task, batch = TASKS[name]()
    accelerator = join_processes("bf16")
    module = accelerator.prepare(task.module)
    with accelerator.autocast():
        losses = task.loss(module, batch)
    losses["loss"].backward()
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    gradients = [weight.grad for weight in task.module.parameters() if weight.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)

"""FSDP: weights, gradients and optimizer state spread over the processes (PyTorch's `fully_shard`).

A tensor of which each process holds a part is a DTensor. The functions below take any tensor, so that the
loop is the same for one process, for copies in each (DDP) and for parts in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_Tree = TypeVar("_Tree")


class LaunchError(RuntimeError):
    """A stage cannot run as it was launched; the text says how to."""


def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """Spreads a module's weights over all processes, in place.

    Its blocks are gathered one after the other when they are computed, what lies outside of blocks always.

    Raises:
        LaunchError: there is one process only.
    """
    if not torch.distributed.is_initialized():
        raise LaunchError("shard = true needs several processes: start with torchrun or accelerate launch")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in _blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules that have weights."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor where `like` is, in its shape, and in as many parts."""
    tensor = tensor.reshape(like.shape)  # a saved scalar may be a vector of one number by now
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


def whole(tree: _Tree) -> _Tree:
    """A state with its tensors put together from all processes; all of them have to call it."""
    gathered: Any = tree
    if isinstance(tree, DTensor):
        gathered = tree.full_tensor().cpu()
    elif isinstance(tree, dict):
        gathered = {key: whole(value) for key, value in tree.items()}
    elif isinstance(tree, list):
        gathered = [whole(value) for value in tree]
    result: _Tree = gathered
    return result

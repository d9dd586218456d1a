"""Shards weights, gradients and optimizer state over processes, by FSDP (PyTorch's `fully_shard`).

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

from engines.errors import AnyDoorError

_Tree = TypeVar("_Tree")


class LaunchError(AnyDoorError):
    """A stage cannot run as it was launched; the text says how to."""


def shard_module(module: nn.Module, device: torch.device) -> nn.Module:
    """Shards a module's weights over all processes, in place.

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
    """Yields the members of the outermost lists of modules that have weights."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def to_local(tensor: Tensor) -> Tensor:
    """Gives this process's part of a tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """Puts a full tensor where `like` is: on its device, in its shape, and sharded as it is."""
    tensor = tensor.reshape(
        like.shape
    )  # saved states may have a scalar where there is a vector of one number
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


def gather(tree: _Tree) -> _Tree:
    """Gathers the tensors of a state from all processes, on the CPU; every process must call it."""
    gathered: Any = tree
    if isinstance(tree, DTensor):
        gathered = tree.full_tensor().cpu()
    elif isinstance(tree, torch.Tensor):
        gathered = tree.detach().cpu()
    elif isinstance(tree, dict):
        gathered = {key: gather(value) for key, value in tree.items()}
    elif isinstance(tree, list):
        gathered = [gather(value) for value in tree]
    result: _Tree = gathered
    return result

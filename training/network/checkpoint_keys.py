"""Selects the tensors of a file that form the network: common prefix, averages, and ignored keys.

Averages of the weights (EMA) are kept beside them, in the original under keys like
`model_ema.diffusion_modelinput_blocks00weight`, elsewhere as a second network whose prefix has "ema" in it.
Source: Latent Diffusion, ldm/modules/ema.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from training.network.checkpoint_file import CheckpointError, TensorFile, read_tensors, some_keys
from training.network.official_keys import PREFIXES

UNET_KEY = PREFIXES["unet"] + "input_blocks.0.0.weight"
"""A key that every UNet in the original layout has."""
DINO_KEY = "patch_embed.proj.weight"
"""A key that every DINOv2 has."""

_EMA_COUNTERS = {"model_ema.decay", "model_ema.num_updates"}


@dataclass(frozen=True)
class NetworkFile:
    """The tensors of a file that are its network, under the names that a checkpoint has."""

    file: TensorFile
    others: tuple[str, ...]
    """Keys that are outside of it."""
    averages: int
    """Tensors of which there is an average too, which was not taken."""

    def remarks(self, unneeded: Iterable[str] = ()) -> str:
        """Describes which keys of the file are ignored; empty if none are.

        Args:
            unneeded: keys of the network that no part needs, beside the others.
        """
        remarks = f"; its averages (EMA) are left out: --ema takes them ({self.averages} tensors)"
        keys = [*unneeded, *self.others]
        return (remarks if self.averages else "") + (
            f"; no part needs {len(keys)} of its keys ({some_keys(keys)})" if keys else ""
        )


def read_network(path: Path, anchor: str = UNET_KEY, ema: bool = False) -> NetworkFile:
    """Opens a checkpoint, and takes off what its keys have in common before those of a network.

    Args:
        path: see `checkpoint_file.read_tensors`.
        anchor: a key that the network has.
        ema: take the averages of weights that have one.

    Raises:
        CheckpointError: it cannot be read, has several networks, or no averages where they are asked for.
    """
    file = read_tensors(path)
    found = [key.removesuffix(anchor) for key in file.shapes if key.endswith(anchor)]
    prefixes = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    averaged = [prefix for prefix in prefixes if "ema" in re.split(r"[._]", prefix.lower())]
    plain = [prefix for prefix in prefixes if prefix not in averaged] or averaged[:1]
    if len(plain) > 1 and "" not in plain:
        raise CheckpointError(f"'{path}' has {len(plain)} networks, whose keys begin with {some_keys(plain)}")
    prefix = "" if "" in plain else next(iter(plain), "")
    copies = [p for p in averaged if p != prefix]
    names = {
        key.removeprefix(prefix): key
        for key in file.shapes
        if key.startswith(prefix) and not any(key.startswith(copy) for copy in copies)
    }
    averages = {name: key for name in names if (key := _average_of(name, prefix, copies, file))}
    if ema and not averages:
        raise CheckpointError(f"'{path}' has no averages (EMA): leave out --ema")
    used = {*averages.values(), *(prefix + counter for counter in _EMA_COUNTERS)}
    chosen = {name: key for name, key in names.items() if key not in used}
    others = tuple(key for key in file.shapes if key not in used and key not in chosen.values())
    return NetworkFile(
        file.renamed({**chosen, **averages} if ema else chosen),
        tuple(key for key in others if not key.startswith(tuple(copies))),
        0 if ema else len(averages),
    )


def _average_of(name: str, prefix: str, copies: Iterable[str], file: TensorFile) -> str:
    """Returns the key of the average of a weight; empty if there is none."""
    first, _, rest = name.partition(".")
    keys = [f"{prefix}{first}_ema.{rest.replace('.', '')}", *(copy + name for copy in copies)]
    return next((key for key in keys if key in file.shapes), "")


def unneeded_keys(keys: Iterable[str], expected: Collection[str]) -> list[str]:
    """Returns keys beside those that are expected that change nothing.

    Those inside of a part of the network do: a checkpoint with one is of another network.
    """
    modules = {_module(key) for key in expected}
    inside = (PREFIXES["unet"], PREFIXES["control"])
    others = [key for key in keys if key not in expected]
    return [key for key in others if not key.startswith(inside) and _module(key) not in modules]


def _module(key: str) -> str:
    return ".".join(key.split(".")[:2])

"""Reads cases that were recorded from the original implementation.

A case is a .npz file with pictures and, under a prefix per run, what the original computed from them. A case
may lack keys. Arrays that several runs share are stored under one of their prefixes. The prefix says which
entry script was run:

    box_         run_inference.py
    shape_       run_gradio_demo.py with shape control (shape_s06g3_: strength 0.6, guidance 3)
    gradiobox_   run_gradio_demo.py without shape control
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from engines.errors import AnyDoorError
from runtime.imaging.geometry import Ratios
from runtime.imaging.modes import MODES, Mode

Array = NDArray[Any]

PICTURES = ("ref_image", "ref_mask", "tar_image", "tar_mask")
_MODE_OF_SCRIPT = {"box": "crop", "shape": "shape", "gradiobox": "keep_background"}
_RUN = re.compile(r"^((?:gradiobox|box|shape)(?:_s\d+g\d+)?)_(.+)$")


@dataclass(frozen=True, eq=False)
class GoldenRun:
    """One run of the original: the arrays recorded under one prefix."""

    case: str
    prefix: str
    arrays: Mapping[str, Array]

    @property
    def label(self) -> str:
        """Case and prefix, as in the tables."""
        return f"{self.case} {self.prefix}"

    @property
    def mode(self) -> Mode:
        """The mode of placement that the entry script of this run has."""
        return MODES[self.mode_name]

    @property
    def mode_name(self) -> str:
        """Our name of that mode."""
        return _MODE_OF_SCRIPT[self.prefix.split("_")[0]]

    @property
    def ratios(self) -> Ratios:
        """The ratios that the original drew at random."""
        return Ratios(*(float(ratio) for ratio in self.arrays["ratios"]))

    def has(self, *names: str) -> bool:
        """Return whether all of these were recorded."""
        return all(name in self.arrays for name in names)

    @property
    def timesteps(self) -> tuple[int, ...] | None:
        """The timesteps of the recorded latents in rising order; None if there are none."""
        if not self.has("ddim_timesteps"):
            return None
        return tuple(int(t) for t in np.sort(self.arrays["ddim_timesteps"]))

    @property
    def hint(self) -> NDArray[np.float32] | None:
        """(4, R, R) in -1..1, and 0 or 1 in the last channel; None if it was not recorded."""
        if self.has("hint"):
            hint = self.arrays["hint"]
        elif self.has("hint_rgb", "hint_mask"):
            rgb = self.arrays["hint_rgb"].astype(np.float32) / 127.5 - 1
            hint = np.concatenate([rgb, self.arrays["hint_mask"][..., None]], axis=-1)
        else:
            return None
        return np.ascontiguousarray(hint.transpose(2, 0, 1), dtype=np.float32)

    @property
    def reference(self) -> NDArray[np.float32] | None:
        """(1, 3, 224, 224) in 0..1; None if it was not recorded."""
        if not self.has("ref"):
            return None
        reference = self.arrays["ref"]
        scale = 255 if reference.dtype == np.uint8 else 1
        return np.ascontiguousarray(
            (reference.astype(np.float32) / np.float32(scale)).transpose(2, 0, 1)[None]
        )

    @property
    def detail_maps(self) -> dict[int, Array]:
        """Number -> detail map of the first step, of those that were recorded whole."""
        matches = (re.fullmatch(r"ctl(\d+)(?:_f16)?", name) for name in self.arrays)
        names = {int(match[1]): match[0] for match in matches if match}
        return {number: self.arrays[names[number]] for number in sorted(names)}


def read_case(path: Path, donor: Path | None = None) -> list[GoldenRun]:
    """Read the runs of a case.

    Args:
        path: the .npz file.
        donor: another case, whose pictures and pre-processed inputs are used where this one has none.

    Raises:
        AnyDoorError: the file is not a case.
    """
    arrays = _load(path)
    if donor is not None:
        prefixes = tuple({f"{match[1].split('_')[0]}_" for name in arrays if (match := _RUN.match(name))})
        borrowed = {
            name: array
            for name, array in _load(donor).items()
            if name in PICTURES or (name.startswith(prefixes) and name.endswith(_BORROWED))
        }
        arrays = borrowed | arrays
    pictures = {name: arrays[name] for name in PICTURES if name in arrays}
    grouped: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        if match := _RUN.match(name):
            grouped.setdefault(match[1], {})[match[2]] = array
    if not grouped:
        raise AnyDoorError(f"'{path}' is not a golden case: it has no box_, shape_ or gradiobox_ arrays")
    runs = []
    for prefix, own in grouped.items():
        script = prefix.split("_")[0]
        shared = {k: v for k, v in grouped.get(script, {}).items() if k in _INPUTS}
        if "x_T" not in own and "x_T" not in shared and "x_T" in grouped.get("box", {}):
            shared["x_T"] = grouped["box"]["x_T"]
        if "tokens_zero" in grouped.get("box", {}):
            shared.setdefault("tokens_zero", grouped["box"]["tokens_zero"])
        runs.append(GoldenRun(path.stem, prefix, pictures | shared | own))
    return runs


_INPUTS = ("ref", "hint", "hint_rgb", "hint_mask", "tokens_ref", "tokens_zero", "x_T", "ratios")
"""What the runs of one script share."""

_BORROWED = ("_ref", "_hint", "_x_T", "_ratios", "_extra_sizes", "_tar_box_yyxx_crop", "_tar_box_yyxx")
"""What a case without pictures takes from another one: the networks' inputs, and the geometry behind them."""


def lacks_inputs(path: Path) -> bool:
    """Return whether a case has no pictures, so that it needs a donor."""
    return not all(name in _load(path) for name in PICTURES)


def read_archive(path: Path) -> NpzFile:
    """Open a .npz file.

    Raises:
        AnyDoorError: it is not one.
    """
    try:
        opened = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise AnyDoorError(f"cannot read the golden case '{path}': a .npz file is expected") from error
    if not isinstance(opened, NpzFile):
        raise AnyDoorError(f"cannot read the golden case '{path}': a .npz file is expected")
    return opened


def _load(path: Path) -> dict[str, Array]:
    with read_archive(path) as stored:
        return {name: stored[name] for name in stored.files}

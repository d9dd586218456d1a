"""Samples that were encoded once, so that training does not wait for it: of IMPRINT's second stage, or with
captions.

A folder of arrays that are mapped, not read: float16 `moments.npy`, and of IMPRINT float16 `scene.npy`,
`features.npy` and, for the attention guide, `places.npy`, bool `counts.npy` and `dropped.npy`; of captions
int32 `ids.npy`. See `ImprintTask.encoded` and `PromptTask.encoded` for what is in them. `done.txt` counts the
rows that are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from engines.files import write_text
from runtime.diffusion.noise_schedule import TRAIN_TIMESTEPS
from runtime.progress_bar import ProgressBar
from training.data.encoded import PAIRS_DONE, EncodedError, rows_done
from training.loop import Batch, NumberedDataset

STORED = ("moments", "scene", "features", "counts", "dropped", "places", "ids")
"""What of an encoded batch is kept; timesteps and noises are drawn anew."""

_DTYPES: Mapping[str, type[np.generic]] = {"counts": np.bool_, "dropped": np.bool_, "ids": np.int32}
"""Of those that are not float16."""


def store_samples(
    samples: NumberedDataset,
    encode: Callable[[Batch], dict[str, Tensor]],
    folder: Path,
    count: int,
    batch: int = 16,
    workers: int = 0,
) -> None:
    """Writes `count` encoded samples to a folder, or those of them that an earlier call left undone.

    Args:
        samples: what to encode.
        encode: see `ImprintTask.encoded`.
        folder: of the arrays.
        count: of samples.
        batch: samples that are encoded at once.
        workers: processes that make samples while others are encoded; 0 makes them in turn.

    Raises:
        EncodedError: the folder holds samples of another shape.
    """
    done = rows_done(folder)
    if done >= count:
        return
    source: Any = samples
    with ProgressBar(total=count, initial=done, unit="sample") as bar:
        for made in DataLoader(source, batch, sampler=range(done, count), num_workers=workers):
            encoded = encode(made)
            rows = slice(done, done + len(encoded["moments"]))
            for name in STORED:
                if name in encoded:
                    values = encoded[name].numpy()
                    shape, dtype = (count, *values.shape[1:]), _DTYPES.get(name, np.float16)
                    _open(folder / f"{name}.npy", shape, dtype)[rows] = values
            bar.update(rows.stop - rows.start)
            done = rows.stop
            write_text(folder / PAIRS_DONE, str(done))


def _open(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """An array on disk, made if it is not there."""
    if not path.exists():
        return open_memmap(path, "w+", dtype, shape)
    array: NDArray[Any] = open_memmap(path, "r+")
    if array.shape != shape:
        raise EncodedError(f"'{path}' has the shape {array.shape}, expected {shape}: give another --folder")
    return array


class StoredSamples:
    """The endless dataset over a folder of encoded samples: item n follows from n and the rows."""

    def __init__(self, folder: Path, seed: int, rows: int) -> None:
        """Opens the arrays; draws from the first `rows` (see `settled_rows`)."""
        self._seed, self._rows = seed, rows
        self._arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in STORED
            if (folder / f"{name}.npy").exists()
        }

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Gives what the losses take of a sample that is encoded: float32, and ids int64."""
        rng = np.random.default_rng([self._seed, number])
        row = int(rng.integers(self._rows))
        sample: dict[str, Any] = {
            name: torch.from_numpy(np.asarray(array[row], np.int64 if name == "ids" else np.float32))
            for name, array in self._arrays.items()
        }
        shape = sample["moments"].shape[1:]
        return {
            **sample,
            "timestep": int(rng.integers(TRAIN_TIMESTEPS)),
            "noise": rng.standard_normal(shape, np.float32),
            "posterior_noise": rng.standard_normal(shape, np.float32),
        }

"""Stores encoded samples, so that training need not encode them: of IMPRINT's second stage, or with captions.
AnyDoor's pairs are written here, too, and read by `training.data.encoded`.

A folder of arrays that are mapped, not read: float16 `moments.npy`, and of IMPRINT float16 `scene.npy`,
`features.npy` and, for the attention guide, `places.npy`, bool `counts.npy` and `dropped.npy`; of captions
int32 `ids.npy`. See `ImprintTask.encoded` and `PromptTask.encoded` for what is in them. `done.txt` counts the
rows that are written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.files import write_text
from runtime.diffusion.noise_schedule import TRAIN_TIMESTEPS
from runtime.progress_bar import ProgressBar
from training.data.arrays import make_array, mapped_array, writable_array
from training.data.device import generator, resident
from training.data.encoded import PAIRS_DONE, EncodedError, rows_done
from training.loop import Batch, NumberedDataset, join_processes
from training.workers import load_samples

STORED = ("moments", "scene", "features", "counts", "dropped", "places", "ids")
"""What of a sample is kept; timesteps and noises are drawn anew."""

_DTYPES: Mapping[str, type[np.generic]] = {
    "counts": np.bool_,
    "dropped": np.bool_,
    "ids": np.int32,
    "hints": np.uint8,
    "single": np.bool_,
}
"""Of those that are not float16."""

BATCH, CARD_BATCH = 16, 64
"""Samples that are encoded at once. A card could take more; the processes that make them share the last ones
evenly when there are few in a batch."""


def store_samples(
    samples: NumberedDataset,
    encode: Callable[[Batch], dict[str, Tensor]],
    folder: Path,
    count: int,
    batch: int = 0,
    workers: int = 0,
    kept: Collection[str] = STORED,
) -> None:
    """Writes `count` encoded samples to a folder, or those of them that an earlier call left undone.

    Args:
        samples: what to encode.
        encode: see `ImprintTask.encoded`; it gets its batches on the accelerator's device.
        folder: of the arrays.
        count: of samples.
        batch: samples that are encoded at once; 0 for as many as suit the device.
        workers: processes that make samples while others are encoded; 0 makes them in turn.
        kept: what of an encoded batch is written.

    Raises:
        EncodedError: the folder holds samples of another shape.
    """
    done = rows_done(folder)
    if done >= count:
        return
    device = join_processes().device
    batch = batch or (BATCH if device.type == "cpu" else CARD_BATCH)
    made = load_samples(samples, batch, range(done, count), workers, stacked)
    with ProgressBar(total=count, initial=done, unit="sample") as bar:
        for arrays in made:
            encoded = encode({name: torch.from_numpy(a).to(device) for name, a in arrays.items()})
            rows = slice(done, done + len(encoded["moments"]))
            for name in kept:
                if name in encoded:
                    values = encoded[name].cpu().numpy()
                    shape, dtype = (count, *values.shape[1:]), _DTYPES.get(name, np.float16)
                    open_rows(folder / f"{name}.npy", dtype, shape)[rows] = values
            bar.update(rows.stop - rows.start)
            done = rows.stop
            write_text(folder / PAIRS_DONE, str(done))


def stacked(samples: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """Collates samples as arrays, which come from other processes through a pipe.

    PyTorch's tensors would come through shared memory, of which a container may have 64 MB.
    """
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def open_rows(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    """Opens an array on disk, made if it is not there.

    Raises:
        EncodedError: it has another shape.
        ArrayError: it is damaged.
    """
    if not path.exists():
        return make_array(path, dtype, shape)
    array = writable_array(path)
    if array.shape != shape:
        raise EncodedError(f"'{path}' has the shape {array.shape}, expected {shape}: give another --folder")
    return array


class StoredSamples:
    """The endless dataset over a folder of encoded samples: item n follows from n and the rows."""

    def __init__(self, folder: Path, seed: int, rows: int) -> None:
        """Opens the arrays; draws from the first `rows` (see `settled_rows`)."""
        self._seed, self._rows = seed, rows
        self._arrays = {
            name: mapped_array(folder / f"{name}.npy") for name in STORED if (folder / f"{name}.npy").exists()
        }
        self._loaded: dict[torch.device, dict[str, Tensor]] = {}

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

    def batch(self, numbers: range, device: torch.device) -> dict[str, Tensor]:
        """Draws a batch in a device's memory, which takes the whole folder at the first call.

        Names, shapes and dtypes are those of samples in a batch, and so are the distributions.
        """
        if device not in self._loaded:
            self._loaded[device] = {
                name: resident(array[: self._rows], device) for name, array in self._arrays.items()
            }
        rng, count = generator(self._seed, numbers, device), len(numbers)
        rows = torch.randint(self._rows, (count,), generator=rng, device=device)
        sample = {
            name: array[rows].to(torch.int64 if name == "ids" else torch.float32)
            for name, array in self._loaded[device].items()
        }
        shape = sample["moments"][:, 0].shape
        sample["timestep"] = torch.randint(TRAIN_TIMESTEPS, (count,), generator=rng, device=device)
        for name in ("noise", "posterior_noise"):
            sample[name] = torch.randn(shape, generator=rng, device=device)
        return sample

"""Makes a checkpoint of the bundle that was built from it, bit for bit, so that one of the two need not be
stored.

Most tensors of a checkpoint are among the weights of the bundle's ONNX graphs: as they are, transposed, or
in up to three parts. `--split` looks for them by content. It writes what is left into the bundle's folder,
in the format of safetensors, with two entries of metadata: the checkpoint's header, and the places of the
others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.bundle import REST, RESTORE_COMMAND, Bundle, Progress, sha256
from engines.errors import AnyDoorError
from engines.files import replacing
from engines.manifest import ONNX
from export.graph_weights import Weights, bytes_bar, read_weights
from export.safetensors_file import Header, SafetensorsFile, header_of
from export.script import run_script

EXAMPLES = f"""examples:
  {RESTORE_COMMAND} examples/anydoor-small
  {RESTORE_COMMAND} examples/anydoor-small -o build/anydoor-small.safetensors
  {RESTORE_COMMAND} --split build/anydoor-small.safetensors examples/anydoor-small
"""

_HEADER, _PLACES = "anydoor.checkpoint_header", "anydoor.places"
"""Metadata of the remainder: text of the checkpoint's header; tensor -> its places, a JSON object."""

_MOST_PARTS = 3
"""Tensors that a graph may hold of one: of queries, keys and values."""

_SMALLEST = 128
"""Bytes; below that, a tensor is no larger than its places."""


class Place(NamedTuple):
    """Where a tensor, or a part of it, is in the bundle."""

    file: str
    """Of the graph."""
    weight: str
    """Name of the initialiser."""
    is_transposed: bool


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is put together."""

    header: Header
    places: Mapping[str, Sequence[Place]]
    """Tensor -> where its parts are, in a row."""
    rest: Mapping[str, memoryview]
    """All other tensors -> their bytes."""

    def pieces(self, weights: Weights) -> Iterator[bytes | memoryview]:
        """Yields the content of the checkpoint.

        Raises:
            KeyError: a tensor is nowhere.
        """
        yield self.header.encoded()
        for tensor in self.header.tensors:
            if tensor.name not in self.places:
                yield self.rest[tensor.name]
                continue
            for place in self.places[tensor.name]:
                weight = weights[place.file][place.weight]
                yield _bytes(weight.T if place.is_transposed else weight)

    def metadata(self) -> dict[str, str]:
        """Returns what the remainder says besides its tensors."""
        return {_HEADER: self.header.text, _PLACES: json.dumps(self.places, separators=(",", ":"))}


def restore(bundle: Path, output: Path | None = None, quiet: bool = False) -> Path:
    """Writes the checkpoint that a bundle was built from.

    Args:
        bundle: of ONNX graphs, with its remainder.
        output: the file to write; by default beside the bundle, X.safetensors beside the folder X, unless
            another checkpoint is there.
        quiet: show no progress.

    Returns:
        The written file.

    Raises:
        AnyDoorError: the bundle is damaged, has no remainder or is not of ONNX graphs, or the file cannot be
            written; says why.
    """
    opened = _open_bundle(bundle)
    output = output or _free_place(opened)
    recipe = _read_recipe(bundle)
    weights = read_weights(opened, quiet)
    try:
        with _bar(recipe.header, "restoring", quiet) as progress, replacing(output) as partial:
            with partial.open("wb") as file:
                digest = _copy(recipe.pieces(weights), file.write, progress)
            if digest != opened.manifest.checkpoint.get("sha256"):
                raise AnyDoorError(
                    f"the weights and the {REST} of '{bundle}' do not belong together: they do not give the "
                    "checkpoint that the bundle was built from (its sha256 differs); copy the bundle again"
                )
    except KeyError as error:
        raise AnyDoorError(
            f"'{bundle / REST}' does not belong to this bundle: there is no {error}"
        ) from error
    except OSError as error:
        raise AnyDoorError(f"cannot write '{output}': {error.strerror or error}") from error
    return output


def split(checkpoint: Path, bundle: Path, quiet: bool = False) -> Recipe:
    """Writes into a bundle what its graphs lack of its checkpoint.

    Args:
        checkpoint: the .safetensors file that the bundle was built from.
        bundle: of ONNX graphs.
        quiet: show no progress.

    Returns:
        What was written.

    Raises:
        AnyDoorError: the bundle is of another checkpoint, damaged, or not of ONNX graphs, or the remainder
            cannot be written; says why.
    """
    opened = _open_bundle(bundle)
    file = _open_checkpoint(checkpoint)
    with _bar(file.header, "hashing the checkpoint", quiet) as progress:
        digest = sha256(checkpoint, progress=progress)
    if digest != opened.manifest.checkpoint.get("sha256"):
        raise AnyDoorError(
            f"'{bundle}' was not built from '{checkpoint}': the sha256 in its manifest is another one"
        )
    weights = read_weights(opened, quiet)
    with _bar(file.header, "looking for its tensors", quiet) as progress:
        places = _find(file, weights, progress)
    rest = {tensor: data for tensor, data in file.tensors() if tensor.name not in places}
    recipe = Recipe(file.header, places, {tensor.name: data for tensor, data in rest.items()})
    with _bar(file.header, "restoring it", quiet) as progress:
        if _copy(recipe.pieces(weights), len, progress) != digest:
            raise AnyDoorError(f"'{checkpoint}' cannot be restored from '{bundle}': other bytes came out")
    try:
        with replacing(bundle / REST) as partial, partial.open("wb") as written:
            written.write(header_of(rest, recipe.metadata()).encoded())
            for data in rest.values():
                written.write(data)
    except OSError as error:
        raise AnyDoorError(f"cannot write '{bundle / REST}': {error.strerror or error}") from error
    return recipe


# --- reading ----------------------------------------------------------------------------------------------


def _open_bundle(path: Path) -> Bundle:
    bundle = Bundle.open(path)
    if bundle.manifest.backend != ONNX:
        raise AnyDoorError(
            f"'{path}' is a bundle of {bundle.manifest.backend}, whose weights cannot be read: give the one "
            "of ONNX graphs that it was built from"
        )
    return bundle


def _open_checkpoint(path: Path) -> SafetensorsFile:
    if path.is_dir():
        raise AnyDoorError(f"'{path}' is a folder: only a checkpoint of one .safetensors file can be split")
    try:
        return SafetensorsFile.open(path)
    except OSError as error:
        raise AnyDoorError(f"cannot read '{path}': {error.strerror or error}") from error
    except ValueError as error:
        raise AnyDoorError(
            f"'{path}' cannot be split ({error}): only a checkpoint of one .safetensors file can be"
        ) from error


def _free_place(bundle: Bundle) -> Path:
    """Returns the default path of a bundle's checkpoint.

    Raises:
        AnyDoorError: another checkpoint is there, which nobody asked to replace.
    """
    output = Path(f"{os.path.abspath(bundle.path)}.safetensors")
    try:
        is_another = output.is_file() and sha256(output) != bundle.manifest.checkpoint.get("sha256")
    except OSError as error:
        raise AnyDoorError(f"cannot read '{output}': {error.strerror or error}") from error
    if is_another:
        raise AnyDoorError(
            f"'{output}' is there, and is not the checkpoint of '{bundle.path}': move it away, or say with "
            "-o where to write"
        )
    return output


def _read_recipe(bundle: Path) -> Recipe:
    path = bundle / REST
    if not path.is_file():
        raise AnyDoorError(
            f"'{bundle}' has no {REST}, which its checkpoint is restored with: whoever has the checkpoint "
            f"writes it with '{RESTORE_COMMAND} --split CHECKPOINT {bundle}'"
        )
    try:
        file = SafetensorsFile.open(path)
        places = json.loads(file.header.metadata[_PLACES])
        return Recipe(
            Header.parse(file.header.metadata[_HEADER]),
            {name: [_read_place(*place) for place in found] for name, found in places.items()},
            {tensor.name: data for tensor, data in file.tensors()},
        )
    except OSError as error:
        raise AnyDoorError(f"cannot read '{path}': {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = error if type(error) is ValueError else "it does not say where the tensors are"
        raise AnyDoorError(f"'{path}' is damaged ({why}): copy the bundle again") from error


def _read_place(file: object, weight: object, is_transposed: object) -> Place:
    if not isinstance(file, str) or not isinstance(weight, str) or not isinstance(is_transposed, bool):
        raise TypeError("a place is a file, a weight and whether it is transposed")
    return Place(file, weight, is_transposed)


# --- finding ----------------------------------------------------------------------------------------------


def _find(file: SafetensorsFile, weights: Weights, progress: Progress) -> dict[str, list[Place]]:
    """Returns tensor -> its parts, for those that the graphs hold."""
    places = _digests(weights)
    found: dict[str, list[Place]] = {}
    for tensor, data in file.tensors():
        progress(len(data))
        for count in range(1, _MOST_PARTS + 1):
            length, remainder = divmod(len(data), count)
            if length < _SMALLEST or remainder:
                continue
            parts = [data[start : start + length] for start in range(0, len(data), length)]
            of_parts = [places[digest] for part in parts if (digest := _digest(part)) in places]
            if len(of_parts) == count:
                found[tensor.name] = of_parts
                break
    return found


def _digests(weights: Weights) -> dict[bytes, Place]:
    """Returns digest -> place, of every weight as it is and transposed."""
    places: dict[bytes, Place] = {}
    for file, initialisers in weights.items():
        for name, weight in initialisers.items():
            places.setdefault(_digest(_bytes(weight)), Place(file, name, False))
            if weight.ndim == 2:
                places.setdefault(_digest(_bytes(weight.T)), Place(file, name, True))
    return places


def _digest(content: memoryview) -> bytes:
    return hashlib.sha256(content).digest()


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# --- writing ----------------------------------------------------------------------------------------------


def _copy(pieces: Iterator[bytes | memoryview], write: Callable[[Any], object], progress: Progress) -> str:
    """Writes pieces in a row; returns the hexadecimal SHA-256 of them all."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        write(piece)
        progress(len(piece))
    return digest.hexdigest()


def _bar(header: Header, what: str, quiet: bool) -> Any:
    return bytes_bar(len(header.encoded()) + header.data_bytes, what, quiet)


# --- the command ------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Defines the command line."""
    result = argparse.ArgumentParser(
        prog=RESTORE_COMMAND,
        description="Restore the checkpoint that a bundle was built from, bit for bit. With --split, write "
        f"what that needs besides the graphs into the bundle: {REST}.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("bundle", type=Path, help="folder of a bundle of ONNX graphs")
    result.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE.safetensors",
        help="checkpoint to write; what is there is replaced (default: beside the bundle, with its name)",
    )
    result.add_argument(
        "--split",
        type=Path,
        metavar="CHECKPOINT",
        help=f"write the {REST} of this checkpoint, a .safetensors file, into the bundle",
    )
    result.add_argument("--quiet", action="store_true", help="show no progress")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `run_script`."""
    options = parser().parse_args(arguments)
    return run_script("restore_checkpoint", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Restores or splits, as the command line says; returns 0.

    Raises:
        AnyDoorError: something cannot be used; says what.
    """
    if options.split and options.output:
        raise AnyDoorError("--output goes without --split, which writes into the bundle")
    if options.split:
        recipe = split(options.split, options.bundle, options.quiet)
        path, count = options.bundle / REST, len(recipe.header.tensors)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, with {len(recipe.rest)} of {count} tensors")
    else:
        print(restore(options.bundle, options.output, options.quiet))
    return 0


if __name__ == "__main__":
    sys.exit(main())

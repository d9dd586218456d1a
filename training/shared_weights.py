"""Stores a checkpoint without the weights that another one beside it has, too.

    python -m training.shared_weights build/imprint/model.safetensors examples/anydoor-small.safetensors \\
        --output examples/imprint-small

writes examples/imprint-small.weights.safetensors with all other weights, and the index
examples/imprint-small.safetensors.index.json, in the format of shards, which is opened like any checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from engines.errors import AnyDoorError
from runtime.errors import InputError
from training.network.checkpoint import write_tensors
from training.network.checkpoint_file import read_tensors

EXAMPLES = """examples:
  python -m training.shared_weights build/imprint/model.safetensors examples/anydoor-small.safetensors \\
      --output examples/imprint-small
"""


def write_shared(model: Path, other: Path, output: Path) -> Path:
    """Writes the weights of a model that another one lacks, and an index of both files.

    Args:
        model: its checkpoint.
        other: checkpoint whose weights are taken where they have the same name, dtype and bits.
        output: of the files, without suffix, in the folder of `other`.

    Returns:
        The index.

    Raises:
        AnyDoorError: a checkpoint cannot be read, or the folders differ.
    """
    if output.resolve().parent != other.resolve().parent:
        raise InputError(f"--output must be in '{other.parent}', because an index names files beside it")
    ours, theirs = read_tensors(model), read_tensors(other)
    own_file = output.with_name(f"{output.name}.weights.safetensors")
    own, places = {}, {}
    for key in sorted(ours.shapes):
        weight = ours.tensors[key]
        found = theirs.tensors[key] if theirs.shapes.get(key) == ours.shapes[key] else None
        shared = found is not None and found.dtype == weight.dtype and torch.equal(found, weight)
        places[key] = other.name if shared else own_file.name
        if not shared:
            own[key] = weight
    write_tensors(own_file, own, ours.metadata)
    index = output.with_name(f"{output.name}.safetensors.index.json")
    content = {"metadata": dict(ours.metadata), "weight_map": places}
    index.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return index


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 if something cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m training.shared_weights",
        description="Store a checkpoint without the weights that another one beside it has.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="checkpoint to store")
    parser.add_argument("other", type=Path, help="checkpoint that has some of its weights")
    parser.add_argument("--output", type=Path, required=True, metavar="NAME", help="beside OTHER, no suffix")
    given = parser.parse_args(arguments)
    try:
        index = write_shared(given.model, given.other, given.output)
    except (AnyDoorError, OSError) as error:
        print(f"shared_weights: {error}", file=sys.stderr)
        return 2
    print(index)
    return 0


if __name__ == "__main__":
    sys.exit(main())

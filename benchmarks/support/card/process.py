"""Measures a part of card.py in a process of its own, and prints a line of JSON for every row."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module

from benchmarks.support.card.task import Row, Task
from engines.errors import AnyDoorError

PARTS = {
    "pictures": ("pictures", "runtime_pictures"),
    "memory": ("memory", "device_memory"),
    "pytorch": ("pictures", "eager_pictures"),
    "pytorch-compiled": ("pictures", "compiled_pictures"),
    "parity": ("parity", "parity"),
    "graphs": ("graphs", "graph_times"),
    "server": ("server", "server"),
    "tensorrt": ("tensorrt", "tensorrt"),
}
"""Part -> module and function that measures it. A part imports what it measures alone, so that its cold start
is that of an application."""


def main(arguments: Sequence[str]) -> int:
    """Print the rows; if something fails, the last line of stderr says what."""
    task = Task.from_json(arguments[0])
    module, function = PARTS[task.part]
    try:
        measure: Callable[[Task], Iterator[Row]] = getattr(
            import_module(f"benchmarks.support.card.{module}"), function
        )
        for row in measure(task):
            print(json.dumps(row), flush=True)
    except ModuleNotFoundError as error:
        print(f"not installed: {error.name}", file=sys.stderr)
        return 1
    except AnyDoorError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

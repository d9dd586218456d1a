"""No file and no function is so long that a reader gets lost in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("engines", "runtime", "export", "training", "benchmarks", "tests", "examples")

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60
PARSERS = {"parser", "add_arguments"}
"""Functions that list the flags of a command, however many there are."""


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        # those of the gRPC stubs are generated
        yield from (path for path in (ROOT / folder).rglob("*.py") if "_pb2" not in path.name)


def test_files() -> None:
    found = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in sources()}
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines > MOST_LINES_OF_A_FILE} == {}


def test_functions() -> None:
    long = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in PARSERS:
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert long == {}

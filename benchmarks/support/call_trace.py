"""Records which functions of a project are called, in all threads, by way of Python's profile hook."""

from __future__ import annotations

import ast
import inspect
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

Hook = Callable[[FrameType, str, Any], None]

_GENERATED = ("_pb2.py", "_pb2_grpc.py")
_IMPORT_SYSTEM = "<frozen importlib"


@dataclass(frozen=True, order=True)
class Function:
    """A function of the project."""

    file: str
    """Relative to the project's folder, with slashes."""
    line: int
    name: str
    """With its class, like Compositor.run."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.name}"


class Project:
    """Maps code objects to the functions of a project.

    Lambdas and comprehensions belong to the function around them. Generated stubs, class bodies and the top
    level of modules are no functions.
    """

    def __init__(self, root: Path, packages: Collection[str]) -> None:
        """Describe a project.

        Args:
            root: its folder.
            packages: names of the folders in it that count; modules beside them count, too.
        """
        self.packages = frozenset(packages)
        self._root = root.resolve()
        self._functions: dict[int, tuple[CodeType, Function | None]] = {}
        """id of a code object -> the object, which must live as long as its id is used, and its function."""
        self._definitions: dict[Path, list[tuple[int, int, str]]] = {}
        self._parsing = threading.RLock()

    def function_of(self, code: CodeType) -> Function | None:
        """Return the function that a code object belongs to; None if it is not one of the project's."""
        known = self._functions.get(id(code))
        if known is None:
            known = self._functions[id(code)] = (code, self._find(code))
        return known[1]

    def _find(self, code: CodeType) -> Function | None:
        # neither modules nor class bodies have optimised local variables
        if not code.co_flags & inspect.CO_OPTIMIZED or code.co_filename.startswith("<"):
            return None
        if code.co_filename.endswith(_GENERATED):
            return None
        path = Path(code.co_filename).resolve()
        if not path.is_relative_to(self._root):
            return None
        relative = path.relative_to(self._root)
        if len(relative.parts) > 1 and relative.parts[0] not in self.packages:
            return None
        around = [
            definition
            for definition in self._definitions_of(path)
            if definition[0] <= code.co_firstlineno <= definition[1]
        ]
        if not around:
            return None
        line, _, name = max(around)  # the innermost starts last
        return Function(relative.as_posix(), line, name)

    def _definitions_of(self, path: Path) -> list[tuple[int, int, str]]:
        """First line, last line and qualified name of every function in a file."""
        # several threads are traced, and ast.parse in two at once fails in Python 3.11 (SystemError)
        with self._parsing:
            if path not in self._definitions:
                self._definitions[path] = list(_definitions(ast.parse(path.read_bytes()), ""))
            return self._definitions[path]


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[int, int, str]]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{prefix}{child.name}."
            if not isinstance(child, ast.ClassDef):
                # code objects start at the first decorator
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                yield first, child.end_lineno or first, inner[:-1]
        yield from _definitions(child, inner)


def is_importing(frame: FrameType) -> bool:
    """Return whether a call is part of the import of a module."""
    outer: FrameType | None = frame
    while outer is not None:
        if outer.f_code.co_filename.startswith(_IMPORT_SYSTEM):
            return True
        outer = outer.f_back
    return False


class CallRecorder:
    """Records the functions that are called, but not those that imports call."""

    def __init__(self, project: Project) -> None:
        self.functions: set[Function] = set()
        self._project = project

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Record a call; a profile hook."""
        if event != "call":
            return
        function = self._project.function_of(frame.f_code)
        if function and function not in self.functions and not is_importing(frame):
            self.functions.add(function)


class Switch:
    """A profile hook that can be turned on and off for all threads that have it."""

    def __init__(self, hook: Hook) -> None:
        self.on = False
        self._hook = hook

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Pass an event on while the switch is on."""
        if self.on:
            self._hook(frame, event, argument)


@contextmanager
def profiling(hook: Hook, this_thread: bool) -> Iterator[None]:
    """Call a hook in all threads that are started inside, and perhaps in this one.

    Args:
        hook: see `sys.setprofile`.
        this_thread: whether also in the thread that enters.
    """
    threading.setprofile(hook)
    if this_thread:
        sys.setprofile(hook)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def files_of(functions: Iterable[Function]) -> set[str]:
    """Return the files that some functions are in."""
    return {function.file for function in functions}

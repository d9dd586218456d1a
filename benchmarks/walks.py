"""How far is the way through the code? Counts the functions that a request passes.

    python benchmarks/walks.py
    python benchmarks/walks.py --list

Two walks, counted with Python's profile hook, in all threads:

- `anydoor composite`, from the command's entry point to the run of the graph that encodes the reference: the
  functions that receive the reference, or an object that holds it (support/reference_walk.py says how it is
  recognised). Functions of runtime/imaging are leaves and do not count.
- a gRPC request of 2 steps, to a server in this process, from its arrival to the answer: all functions, and
the
  files that they are in.

A lambda or a comprehension belongs to the function around it. Generated stubs, the top level of modules and
what imports call do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import io
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import runtime
from benchmarks.support import example
from benchmarks.support.bundle_option import add_bundle_option
from benchmarks.support.call_trace import CallRecorder, Function, Project, Switch, files_of, profiling
from benchmarks.support.reference_walk import PictureMarks, ReferenceWalk
from engines.errors import AnyDoorError

if TYPE_CHECKING:
    from runtime.server.serve import Server

ROOT = Path(runtime.__file__).parents[1]
PACKAGES = ("engines", "runtime", "export", "training")
LEAVES = "runtime/imaging/"

STEPS = 2
_PATIENCE = 600.0
"""Seconds to wait for the server."""
_SETTLING = 0.2
"""Seconds in which the server ends what it does for a request after the answer."""


def command_line_walk(bundle: Path) -> list[Function]:
    """Return the functions that the reference passes from the command to the encoder, leaves left out.

    Args:
        bundle: what the command runs.

    Raises:
        AnyDoorError: the command fails, or the reference does not reach an engine.
    """
    project = Project(ROOT, PACKAGES)
    entry = entry_point(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        # names that are nowhere else
        reference = Path(shutil.copy(example.OBJECT, Path(folder) / "walk-reference.png"))
        scene = Path(shutil.copy(example.SCENE, Path(folder) / "walk-scene.png"))
        box = ",".join(map(str, example.scene_box()))
        arguments = [
            "composite",
            "--bundle",
            str(bundle),
            "--reference",
            str(reference),
            "--scene",
            str(scene),
        ]
        arguments += ["--box", box, "--steps", str(STEPS), "--seed", "7", "--quiet"]
        arguments += ["--output", str(Path(folder) / "walk.png")]
        walk = ReferenceWalk(project, PictureMarks(reference), PictureMarks(scene), _runs_a_graph)
        with _command(arguments), profiling(walk, this_thread=True):
            code = entry()
    if code != 0 or not walk.ended:
        raise AnyDoorError(
            "the reference did not reach an engine" if code == 0 else "anydoor composite failed"
        )
    first = project.function_of(entry.__code__)
    # the entry point takes its arguments from sys.argv
    functions = [first, *walk.functions] if first and first not in walk.functions else walk.functions
    return [function for function in functions if not function.file.startswith(LEAVES)]


def entry_point(root: Path) -> Any:
    """Return the function that the command `anydoor` calls, from the project's pyproject.toml."""
    content = (root / "pyproject.toml").read_text("utf-8")
    found = re.search(r'^anydoor\s*=\s*"([\w.]+):(\w+)"', content, re.MULTILINE)
    if not found:
        raise AnyDoorError(f"'{root / 'pyproject.toml'}' names no entry point of the command anydoor")
    return getattr(importlib.import_module(found[1]), found[2])


def _runs_a_graph(function: Function) -> bool:
    return function.file.startswith("engines/") and function.name.rpartition(".")[2] == "run"


@contextmanager
def _command(arguments: Sequence[str]) -> Iterator[None]:
    """Set what the command reads from the process, and swallow what it prints."""
    command, variables = sys.argv, dict(os.environ)
    sys.argv = ["anydoor", *arguments]
    # or the command would replace this process by itself, with this variable
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=0"
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.argv = command
        os.environ.clear()
        os.environ.update(variables)


def request_walk(bundle: Path) -> set[Function]:
    """Return all functions that a server calls for one request.

    Raises:
        AnyDoorError: the server cannot be started, or refuses the request.
    """
    from runtime import Placement, Sampling
    from runtime.client import Client

    recorder = CallRecorder(Project(ROOT, PACKAGES))
    switch = Switch(recorder)
    # the client runs in this thread, which is not profiled
    with (
        profiling(switch, this_thread=False),
        _server(bundle) as (server, run),
        Client(server.addresses[0], timeout=_PATIENCE) as client,
    ):
        placement = Placement(example.OBJECT, box=example.scene_box())
        switch.on = True
        client.composite(example.SCENE, placement, seed=7, sampling=Sampling(steps=STEPS))
        run(asyncio.sleep(_SETTLING))
        switch.on = False
    return recorder.functions


@contextmanager
def _server(bundle: Path) -> Iterator[tuple[Server, Callable[[Any], Any]]]:
    """Yields a server on the loopback, in a thread of this process; and a function that runs a coroutine
    there."""
    from runtime import Compositor
    from runtime.server.serve import Server
    from runtime.server.settings import Settings

    compositor = Compositor.load(bundle)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(_PATIENCE)

    async def start() -> Server:
        server = Server(compositor, Settings(bundle=str(bundle), listen=("127.0.0.1:0",)))
        await server.start()
        return server

    try:
        server = run(start())
        try:
            yield server, run
        finally:
            run(server.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_PATIENCE)
        loop.close()


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="walks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_bundle_option(result)
    result.add_argument("--list", action="store_true", help="print every function of the gRPC request, too")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the functions and a line with their numbers; returns 0 or 2."""
    options = parser().parse_args(arguments)
    try:
        of_command = command_line_walk(options.bundle)
        of_request = request_walk(options.bundle)
    except AnyDoorError as error:
        print(f"walks.py: {error}", file=sys.stderr)
        return 2
    print("the reference, from the command to its encoder:")
    for function in of_command:
        print(f"  {function}")
    if options.list:
        print("a gRPC request:")
        for function in sorted(of_request):
            print(f"  {function}")
    without = {function for function in of_request if not function.file.startswith(LEAVES)}
    print(
        f"walks: CLI to ID encoder {len(of_command)} functions; "
        f"gRPC request {len(of_request)} functions in {len(files_of(of_request))} files "
        f"({len(without)} in {len(files_of(without))} without {LEAVES.rstrip('/')})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Implements the command line: runs a command, and turns errors into one sentence and exit code 2.

A command is a module with the names of `Command`, below, and an entry in the group `anydoor.commands` of any
installed distribution:

    [project.entry-points."anydoor.commands"]
    build = "export.build_engines"
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from engines.errors import AnyDoorError, BackendError
from runtime.standard_output import forget_output

GROUP = "anydoor.commands"

BUILT_IN: Mapping[str, tuple[str, str]] = {
    "composite": ("runtime.cli.composite", "cpu"),
    "draw": ("runtime.cli.draw", "cpu"),
    "segment": ("runtime.cli.segment", "cpu"),
    "remove": ("runtime.cli.edits.remove", "cpu"),
    "move": ("runtime.cli.edits.move", "cpu"),
    "reshape": ("runtime.cli.edits.reshape", "cpu"),
    "swap": ("runtime.cli.edits.swap", "cpu"),
    "try-on": ("runtime.cli.edits.try_on", "cpu"),
    "studio": ("runtime.cli.studio", "cpu,http"),
    "serve": ("runtime.cli.serve", "cpu,serve"),
    "health": ("runtime.cli.health", "serve"),
    "doctor": ("runtime.cli.doctor", "cpu"),
    "sign": ("runtime.cli.sign", "cpu,sign"),
    "build": ("export.build_engines", "export"),
}
"""Maps names to modules, and to the extras of this package that the command needs. They are entries of the
group too, but looking those up takes longer than importing the module."""

_VERSION = "--version"
_EVERYWHERE = ("-v", "--verbose", "--no-huge-pages")
"""Flags that may stand before or after the command; `anydoor_command` handles them."""


class Command(Protocol):
    """The interface of a command's module."""

    NAME: str
    """Its name: `anydoor NAME`."""
    HELP: str
    """What it does, in one line."""
    EXAMPLES: str
    """Command lines, one per line, for the end of its help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds its flags."""

    def run(self, options: argparse.Namespace) -> int:
        """Runs the command; returns the exit code.

        Raises:
            AnyDoorError: says in one sentence what the user can fix.
        """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: what follows `anydoor`; those of this process if None.

    Returns:
        The exit code: that of the command, or 2 for anything that the user can fix.
    """
    given = join_negative_values(sys.argv[1:] if arguments is None else arguments)
    if sys.stderr is None:
        # it was closed: what is said goes nowhere, and no other file may take its number
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    _show_any_name()
    name = next((argument for argument in given if argument not in _EVERYWHERE), "")
    try:
        commands = [load_command(name)] if name in BUILT_IN else [] if name == _VERSION else all_commands()
        options = parser(commands).parse_args(given)
        code: int = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except AnyDoorError as error:
        print(f"anydoor: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("anydoor: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        forget_output()
        if isinstance(error, BrokenPipeError):
            return 1  # the reader of the output has gone
        file = f" '{error.filename}'" if error.filename else " to standard output"
        print(f"anydoor: cannot write{file}: {error.strerror or error}", file=sys.stderr)
        return 2


def join_negative_values(arguments: Sequence[str]) -> list[str]:
    """Joins flags and values like -20,30,265,239 with "=": argparse takes such a value for a flag."""
    joined: list[str] = []
    for argument in arguments:
        if re.match(r"-[\d.]", argument) and joined and re.fullmatch(r"--\w[\w-]*", joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _show_any_name() -> None:
    """Prints characters that the terminal's encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def parser(commands: Iterable[Command]) -> argparse.ArgumentParser:
    """Builds the parser of a command line with some commands. Its result has a function `run`."""
    result = _Parser(
        prog="anydoor",
        description="Put an object from one picture into another, or draw a picture from a prompt.",
        epilog="anydoor COMMAND --help lists the flags of a command, with examples.",
    )
    result.add_argument(_VERSION, action=_ShowVersion, nargs=0, help="show the installed version and exit")
    _add_flags_for_everywhere(result)
    subparsers = result.add_subparsers(required=True, metavar="COMMAND")
    for command in commands:
        subparser = subparsers.add_parser(
            command.NAME,
            help=command.HELP[0].lower() + command.HELP[1:],
            description=f"{command.HELP}.",
            epilog="examples:\n" + "".join(f"  {line}\n" for line in command.EXAMPLES.strip().splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        _add_flags_for_everywhere(subparser)
        subparser.set_defaults(run=command.run)
    return result


class _Parser(argparse.ArgumentParser):
    """Refuses a command line in one sentence: the list of all flags would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"anydoor: {message} (see: {self.prog} --help)\n")


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from runtime.version import version  # takes a while

        print(f"anydoor-runtime {version()}")
        parser.exit()


def load_command(name: str) -> Command:
    """Imports the module of a command of this package.

    Raises:
        BackendError: a package that it imports is not installed.
    """
    module, extras = BUILT_IN[name]
    try:
        command: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_package(error, extras) from error
    loaded: Command = command
    return loaded


def all_commands() -> list[Command]:
    """Loads all installed commands; reports on standard error which cannot be loaded."""
    from importlib.metadata import entry_points

    others = {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in BUILT_IN}
    commands: list[Command] = []
    for name in (*BUILT_IN, *others):
        try:
            commands.append(load_command(name) if name in BUILT_IN else others[name].load())
        except (AnyDoorError, ImportError, AttributeError) as error:
            print(f"anydoor: the command '{name}' cannot be loaded: {error}", file=sys.stderr)
    return commands


def missing_package(error: ImportError, extras: str) -> AnyDoorError:
    """Returns the error for a failed import, which names the extras that install the package."""
    package = (error.name or "").partition(".")[0]
    return BackendError(f"the package '{package}' is missing; install it with: pip install '.[{extras}]'")


def _add_flags_for_everywhere(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("process")
    group.add_argument(
        "--no-huge-pages",
        action="store_true",
        help="do not re-execute with 2 MB memory pages (Linux)",
    )
    group.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="report on standard error if the command re-executes itself",
    )

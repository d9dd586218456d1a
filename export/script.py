"""Runs commands as scripts: errors become one sentence and an exit code, as those of `anydoor` do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from engines.errors import AnyDoorError


def run_script(name: str, run: Callable[[], int]) -> int:
    """Runs a command.

    Args:
        name: of the script, before its errors.
        run: the command; returns its exit code.

    Returns:
        The exit code: 2 for what the user can fix, 130 after Ctrl-C, 1 where nobody reads the output.
    """
    try:
        code = run()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except AnyDoorError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _forget_output()
        return 1


def _forget_output() -> None:
    """Redirects standard output to the null device, or Python would try to flush it again at exit."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Runs the server as a process of its own: its signals, its log and its exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import NoReturn

from engines.errors import AnyDoorError
from runtime.server import tracing
from runtime.server.decoding import end_decoders
from runtime.server.logs import FIELDS, LogWriter, json_logs
from runtime.server.memory import share_one_arena
from runtime.server.serve import Server, open_models
from runtime.server.settings import Settings

_ENDING = (signal.SIGTERM, signal.SIGINT)
_SWITCH_SECONDS = 0.0005

logger = logging.getLogger(__name__)


def serve(settings: Settings, logs_refusal: bool = True) -> int:
    """Serves until SIGTERM or SIGINT.

    Args:
        settings: of the server.
        logs_refusal: whether the log says why the server cannot start, instead of an exception.

    Returns:
        The exit code: 0; 1 if the engine failed for good; 2 if the bundle or a setting cannot be used.

    Raises:
        AnyDoorError: the bundle or a setting cannot be used.
    """
    with json_logs(settings.log_level) as log:
        try:
            tracing.configure()
            # the engine's thread needs the interpreter between two calls: a flood must not keep it waiting
            sys.setswitchinterval(_SWITCH_SECONDS)
            share_one_arena()
            return asyncio.run(_run(settings, log))
        except AnyDoorError as error:
            if not logs_refusal:
                raise
            logger.error("not started", extra={FIELDS: {"reason": str(error)}})
            return 2
        finally:
            end_decoders()


async def _run(settings: Settings, log: LogWriter) -> int:
    stop = stop_on_signals()
    # what is reloaded has not been read yet
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: None)
    logger.info("loading", extra={FIELDS: {"models": [*settings.bundles]}})
    # a library that opens a file cannot be interrupted: a thread waits for it, and this one for signals
    opening = asyncio.create_task(asyncio.to_thread(open_models, settings))
    await asyncio.wait([opening, asyncio.create_task(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
    if not opening.done():
        logger.info("stopped", extra={FIELDS: {"all_finished": True}})
        _exit(0, log)
    compositor, filler, bundles = opening.result()
    server = Server(compositor, settings, filler, bundles)
    server.metrics.log_lines_dropped.set_function(lambda: log.dropped)
    return await run(server, stop, log)


def stop_on_signals() -> asyncio.Event:
    """Returns an event that SIGTERM and SIGINT set; a second one ends the process at once."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def end() -> None:
        for number in _ENDING:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        stop.set()

    for number in _ENDING:
        loop.add_signal_handler(number, end)
    return stop


async def run(server: Server, stop: asyncio.Event, log: LogWriter | None = None) -> int:
    """Runs a server until `stop` is set or its engine has failed for good.

    Args:
        server: has not been started.
        stop: ends it.
        log: is closed if the process ends here.

    Returns:
        The exit code.

    Raises:
        AnyDoorError: the graphs cannot be loaded.
    """
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.reload)
    starting = asyncio.create_task(server.start())
    waits = [asyncio.create_task(wait()) for wait in (stop.wait, server.engine_lost.wait)]
    try:
        await asyncio.wait([starting, waits[0]], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        starting.cancel()
        await server.stop()
    code = 0 if stop.is_set() else 1
    if server.is_busy:
        # what a thread is at in a library, like loading a graph, cannot be ended otherwise
        _exit(code, log)
    return code


def _exit(code: int, log: LogWriter | None) -> NoReturn:
    if log:
        log.close()
    os._exit(code)

"""Writes structured logs without blocking: one JSON object per line on standard error."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler
from typing import Any

FIELDS = "fields"
"""Attribute of a record with fields of its own: logger.info("listening", extra={FIELDS: {"port": 50051}})."""

_LINES = 10_000
"""That wait to be read; further ones are dropped, and counted."""
_LAST_SECONDS = 1.0
_STANDARD_ERROR = 2


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, logger, event, and the fields it was logged with."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class LogWriter(QueueHandler):
    """Writes records to a descriptor, in a thread of its own: a pipe that nobody reads stops that alone."""

    def __init__(self, descriptor: int, lines: int = _LINES) -> None:
        """Starts the thread.

        Args:
            descriptor: where to write.
            lines: that may wait.
        """
        self._lines: queue.Queue[logging.LogRecord | None] = queue.Queue(lines)
        super().__init__(self._lines)
        self.setFormatter(JsonFormatter())
        self._descriptor = descriptor
        self.dropped = 0
        """Lines that were dropped so far."""
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def prepare(self, record: logging.LogRecord) -> Any:
        """Returns the record as a line, at once: what it refers to may change."""
        return self.format(record)

    def enqueue(self, record: logging.LogRecord) -> None:
        """Keeps a line, or drops it. See `logging.handlers.QueueHandler.enqueue`."""
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Waits a second for the lines that are kept."""
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(_LAST_SECONDS)
        super().close()

    def _write(self) -> None:
        told = 0
        while (line := self._lines.get()) is not None:
            content = f"{line}\n".encode(errors="replace")
            while content:
                try:
                    content = content[os.write(self._descriptor, content) :]
                except OSError:
                    break  # nobody reads any more
            if self.dropped > told and self._lines.empty():
                told = self.dropped
                fields = {"name": __name__, "levelname": "WARNING", FIELDS: {"in_all": told}}
                self.emit(logging.makeLogRecord({"msg": "log lines dropped", **fields}))


@contextmanager
def json_logs(level: str) -> Iterator[LogWriter]:
    """Sends everything from `level` up to standard error, and as JSON what else is written there: by gRPC, by
    the interpreter, by the processes of this one.

    When the block ends, standard error and the root logger are as they were, and what was written is there.
    """
    before = os.dup(_STANDARD_ERROR)
    writer = LogWriter(before)
    reading, writing = os.pipe()
    os.dup2(writing, _STANDARD_ERROR)
    os.close(writing)
    relay = threading.Thread(target=_relay, args=(reading,), name="stderr", daemon=True)
    relay.start()
    logging.captureWarnings(True)  # Pillow's, of damaged pictures
    root = logging.getLogger()
    handlers, level_before = root.handlers, root.level
    root.handlers = [writer]
    root.setLevel(level.upper())
    try:
        yield writer
    finally:
        root.handlers = handlers
        root.setLevel(level_before)
        os.dup2(before, _STANDARD_ERROR)
        relay.join(_LAST_SECONDS)  # other processes may still write there
        writer.close()


def _relay(descriptor: int) -> None:
    logger = logging.getLogger("stderr")
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            logger.warning(line.rstrip())

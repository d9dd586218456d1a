"""Bounds the time of an await."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(seconds: float, operation: Awaitable[T]) -> T:
    """Waits for an operation, which is cancelled when the time is over or whoever waits is cancelled.

    Up to Python 3.11 `asyncio.wait_for` loses a cancellation that comes in the moment in which the operation
    ends (https://github.com/python/cpython/issues/86296): a request that its caller left would go on.

    Raises:
        asyncio.TimeoutError: it takes longer than `seconds`.
    """
    task: asyncio.Future[T] = asyncio.ensure_future(operation)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio complains
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        task.cancel()
    if not done:
        raise asyncio.TimeoutError
    return task.result()

"""Waiting for something with a bound."""

from __future__ import annotations

import asyncio

import pytest

from runtime.server.timeouts import within


async def ends_with(future: asyncio.Future[int]) -> int:
    return await future


def test_the_result_or_the_error_of_the_operation_is_given() -> None:
    async def fail() -> None:
        raise KeyError("x")

    async def main() -> None:
        assert await within(60, asyncio.sleep(0, 7)) == 7
        with pytest.raises(KeyError):
            await within(60, fail())

    asyncio.run(main())


def test_what_takes_too_long_is_cancelled() -> None:
    async def main() -> None:
        future = asyncio.get_running_loop().create_future()
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, ends_with(future))
        await asyncio.sleep(0)
        assert future.cancelled()

    asyncio.run(main())


@pytest.mark.parametrize("turns", range(4))
def test_a_cancellation_is_heard_also_as_the_operation_ends(turns: int) -> None:
    async def main() -> bool:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(within(60, ends_with(future)))
        await asyncio.sleep(0.01)
        future.set_result(7)
        for _ in range(turns):
            await asyncio.sleep(0)
        ended = waiting.done()
        waiting.cancel()
        await asyncio.wait({waiting})
        return ended or waiting.cancelled()

    assert asyncio.run(main())

"""Does a server leak memory or lose requests? Sends mixed load, cancelled requests and garbage for minutes.

    python benchmarks/soak.py --bundle examples/anydoor-small --minutes 10

Several callers send without a pause: good requests of every kind, streams that are cancelled half-way,
deadlines that are too short, malformed fields and random bytes. Every answer must be one that is allowed for
its kind of request. The server's resident memory is sampled; after the warm-up (the first fifth) it must not
grow by more than 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil

from benchmarks.support.bundle_option import add_bundle_option
from benchmarks.support.server_process import ServerProcess, request
from engines.errors import AnyDoorError
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub

_CALLERS = 10
_SAMPLE_SECONDS = 2.0
_WARM_UP = 0.2
_TOLERANCE = 0.05
_PATIENCE = 120.0
_OPTIONS = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", -1)]

EXPECTED = {
    "good": {"OK", "RESOURCE_EXHAUSTED"},
    "streamed": {"OK", "RESOURCE_EXHAUSTED"},
    "left half-way": {"LEFT", "RESOURCE_EXHAUSTED"},
    "late": {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"},
    "malformed": {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"},
    "garbage": {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"},  # a few bytes may parse as an empty request
}
"""Kind of request -> how it may end. A good one may be refused, but not lost."""


class Caller:
    """Sends one request after the other until the time is over."""

    def __init__(self, channel: grpc.aio.Channel, seed: int, outcomes: Counter[tuple[str, str]]) -> None:
        self._stub: Any = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        self._raw: Any = channel.unary_unary("/anydoor.v1.CompositorService/Composite")
        self._random = random.Random(seed)
        self._outcomes = outcomes

    async def run(self, until: float) -> None:
        """Send, and count how every request ends."""
        while time.monotonic() < until:
            kind = self._random.choice(list(EXPECTED))
            try:
                code = await self._send(kind)
            except grpc.aio.AioRpcError as error:
                code = error.code().name
            self._outcomes[kind, code] += 1
            if code == "RESOURCE_EXHAUSTED":
                await asyncio.sleep(0.05)

    async def _send(self, kind: str) -> str:
        if kind == "garbage":
            await self._raw(self._random.randbytes(self._random.randrange(1, 5000)), timeout=_PATIENCE)
            return "OK"
        message = self._message(kind)
        if kind in ("good", "malformed", "late"):
            timeout = self._random.uniform(0.01, 0.3) if kind == "late" else _PATIENCE
            response = await self._stub.Composite(message, timeout=timeout)
            return "OK" if len(response.images) == message.num_images else "LOST"
        call = self._stub.CompositeStream(
            pb.CompositeStreamRequest(request=message, preview_every=3), timeout=_PATIENCE
        )
        last = None
        async for event in call:
            last = event
            if kind == "left half-way" and event.HasField("step_done"):
                call.cancel()
                return "LEFT"
        return "OK" if last is not None and last.HasField("result") else "LOST"

    def _message(self, kind: str) -> pb.CompositeRequest:
        message = request(
            self._random.randrange(40),
            self._random.choice((3, 5, 8)),
            num_images=self._random.choice((1, 1, 2)),
            output_format=self._random.randrange(4),
        )
        if kind == "malformed":
            if self._random.random() < 0.5:
                message.scene = message.scene[: self._random.randrange(len(message.scene) - 20)]
            else:
                message.sampling.guidance_scale = -1
        return message


async def soak(server: ServerProcess, minutes: float) -> tuple[Counter[tuple[str, str]], list[float]]:
    """Return outcomes, and the server's resident memory in MB, sampled at equal intervals."""
    outcomes: Counter[tuple[str, str]] = Counter()
    memory: list[float] = []
    process = psutil.Process(server.process.pid)
    until = time.monotonic() + minutes * 60
    async with grpc.aio.insecure_channel(server.address, _OPTIONS) as channel:
        callers = [
            asyncio.create_task(Caller(channel, seed, outcomes).run(until)) for seed in range(_CALLERS)
        ]
        while time.monotonic() < until:
            memory.append(process.memory_info().rss / 1e6)
            await asyncio.sleep(_SAMPLE_SECONDS)
        await asyncio.gather(*callers)
    return outcomes, memory


def report(outcomes: Counter[tuple[str, str]], memory: Sequence[float]) -> bool:
    """Print the results; returns whether no request was lost and no memory leaked."""
    wrong = {key: count for key, count in outcomes.items() if key[1] not in EXPECTED[key[0]]}
    for (kind, code), count in sorted(outcomes.items()):
        print(f"{kind:<14} {code:<20} {count:>7}{'   wrong' if (kind, code) in wrong else ''}")
    warm = memory[int(len(memory) * _WARM_UP) :]
    part = max(len(warm) // 5, 1)
    before, after = statistics.median(warm[:part]), statistics.median(warm[-part:])
    growth = after / before - 1
    print(f"{sum(outcomes.values())} requests, {sum(wrong.values())} ended wrongly")
    print(
        f"resident memory {before:.0f} MB after the warm-up, {after:.0f} MB at the end ({growth:+.1%}), "
        f"at most {max(warm):.0f} MB"
    )
    return not wrong and growth <= _TOLERANCE


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_bundle_option(result)
    result.add_argument("--minutes", type=float, default=10, metavar="M")
    result.add_argument("--log", type=Path, metavar="FILE", help="where the server's log lines go")
    result.add_argument("--cache-bytes", type=int, default=1 << 26, metavar="N", help="of the server")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a request was lost or memory leaked, or 2."""
    options = parser().parse_args(arguments)
    flags = ["--queue=3", f"--cache-bytes={options.cache_bytes}", "--max-previews=8"]
    try:
        with ServerProcess(options.bundle, *flags, log=options.log) as server:
            outcomes, memory = asyncio.run(soak(server, options.minutes))
            alive = server.process.poll() is None
    except AnyDoorError as error:
        print(f"soak.py: {error}", file=sys.stderr)
        return 2
    if not alive:
        print("the server died")
    return 0 if report(outcomes, memory) and alive else 1


if __name__ == "__main__":
    sys.exit(main())

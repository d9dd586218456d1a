"""Does a server leak memory or lose requests? Sends mixed load, cancelled requests and garbage for minutes.

    python benchmarks/soak.py --bundle examples/anydoor-small --minutes 10

Several callers send without a pause, over gRPC and HTTP: good requests of every kind, jobs, streams that are
cancelled half-way, deadlines that are too short, malformed fields and random bytes. Every answer must be one
that is allowed for its kind of request. The server's resident memory is sampled; after the warm-up (the first
fifth) it must not grow by more than 5 %. If the server dies, or the command is stopped, the results have what
was counted until then.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from benchmarks.support.bundle_option import add_bundle_option
from benchmarks.support.http_caller import KINDS, HttpCaller
from benchmarks.support.machine import describe
from benchmarks.support.numbers import positive
from benchmarks.support.results import require_writable, write_results
from benchmarks.support.server_process import CHANNEL_OPTIONS, ServerProcess, request, resident_bytes
from engines.errors import AnyDoorError
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub

_CALLERS = 10
_SAMPLE_SECONDS = 2.0
_WARM_UP = 0.2
_TOLERANCE = 0.05
_PATIENCE = 120.0

EXPECTED = {
    "good": {"OK", "RESOURCE_EXHAUSTED"},
    "streamed": {"OK", "RESOURCE_EXHAUSTED"},
    "left half-way": {"LEFT", "RESOURCE_EXHAUSTED"},
    "late": {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"},
    "malformed": {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"},
    "garbage": {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"},  # a few bytes may parse as an empty request
    **KINDS,
}
"""Kind of request -> how it may end. A good one may be refused, but not lost."""


class Caller:
    """Sends one request after the other."""

    def __init__(
        self, channel: grpc.aio.Channel, http: HttpCaller, seed: int, outcomes: Counter[tuple[str, str]]
    ) -> None:
        self._http = http
        self._stub: Any = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        self._raw: Any = channel.unary_unary("/anydoor.v1.CompositorService/Composite")
        self._random = random.Random(seed)
        self._outcomes = outcomes

    async def run(self, goes_on: Callable[[], bool]) -> None:
        """Send, and count how every request ends."""
        while goes_on():
            kind = self._random.choice(list(EXPECTED))
            try:
                code = await self._send(kind)
            except grpc.aio.AioRpcError as error:
                code = error.code().name
            except (OSError, http.client.HTTPException, ValueError) as error:
                # over HTTP: the connection broke, or half an answer came
                code = type(error).__name__
            self._outcomes[kind, code] += 1
            if code == "RESOURCE_EXHAUSTED":
                await asyncio.sleep(0.05)

    async def _send(self, kind: str) -> str:
        if kind == "garbage":
            await self._raw(self._random.randbytes(self._random.randrange(1, 5000)), timeout=_PATIENCE)
            return "OK"
        message = self._message(kind)
        if kind in KINDS:
            return await asyncio.to_thread(self._http.send, kind, message)
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


async def soak(
    server: ServerProcess, minutes: float, outcomes: Counter[tuple[str, str]], memory: list[float]
) -> None:
    """Send for a time, or until the server dies.

    Args:
        server: what is soaked.
        minutes: for how long.
        outcomes: kind of request and how it ended -> times; counted up.
        memory: MB that the server and its processes have resident, sampled at equal intervals; appended to.
    """
    until = time.monotonic() + minutes * 60

    def goes_on() -> bool:
        return time.monotonic() < until and server.process.poll() is None

    async with grpc.aio.insecure_channel(server.address, CHANNEL_OPTIONS) as channel:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_CALLERS))
        callers = [
            asyncio.create_task(Caller(channel, HttpCaller(server.http, seed), seed, outcomes).run(goes_on))
            for seed in range(_CALLERS)
        ]
        while goes_on():
            memory.append(resident_bytes(server.process.pid) / 1e6)
            await asyncio.sleep(_SAMPLE_SECONDS)
        await asyncio.gather(*callers)


def summary(outcomes: Counter[tuple[str, str]], memory: Sequence[float]) -> dict[str, Any]:
    """Returns what a results file has: outcomes by kind of request, and memory in MB."""
    wrong = {key: count for key, count in outcomes.items() if key[1] not in EXPECTED[key[0]]}
    warm = memory[int(len(memory) * _WARM_UP) :] or [0.0]
    part = max(len(warm) // 5, 1)
    before, after = statistics.median(warm[:part]), statistics.median(warm[-part:])
    return {
        "requests": sum(outcomes.values()),
        "wrong": {f"{kind}: {code}": count for (kind, code), count in sorted(wrong.items())},
        "outcomes": {
            kind: {code: count for (of, code), count in sorted(outcomes.items()) if of == kind}
            for kind in EXPECTED
        },
        "memory_mb": {
            "after_warm_up": round(before),
            "at_the_end": round(after),
            "at_most": round(max(warm)),
            "growth": round(after / before - 1, 4) if before else 0.0,
        },
    }


def report(found: dict[str, Any]) -> bool:
    """Print the results; returns whether no request was lost and no memory leaked."""
    for kind, ends in found["outcomes"].items():
        print(f"{kind:<20} {', '.join(f'{code} {count}' for code, count in ends.items())}")
    memory, wrong = found["memory_mb"], found["wrong"]
    print(f"{found['requests']} requests, {sum(wrong.values())} ended wrongly {wrong or ''}")
    print(
        f"resident memory {memory['after_warm_up']} MB after the warm-up, "
        f"{memory['at_the_end']} MB at the end ({memory['growth']:+.1%}), at most {memory['at_most']} MB"
    )
    return not wrong and memory["growth"] <= _TOLERANCE


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_bundle_option(result)
    result.add_argument("--minutes", type=positive(float), default=10, metavar="M", help="default: 10")
    result.add_argument("--log", type=Path, metavar="FILE", help="where the server's log lines go")
    result.add_argument("--output", type=Path, metavar="FILE", help="results, as JSON")
    result.add_argument(
        "--cache-bytes", type=int, default=1 << 26, metavar="N", help="--cache-bytes of the server"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a request was lost or memory leaked, or 2."""
    options = parser().parse_args(arguments)
    # results of jobs fill their share, a quarter, during the warm-up
    flags = ["--queue=3", f"--cache-bytes={options.cache_bytes}", "--max-previews=8", "--http=127.0.0.1:0"]
    flags += ["--request-memory=48M", "--max-message-bytes=4M"]
    outcomes: Counter[tuple[str, str]] = Counter()
    memory: list[float] = []
    try:
        if options.output:
            require_writable(options.output)
        with ServerProcess(options.bundle, *flags, log=options.log) as server:
            try:
                asyncio.run(soak(server, options.minutes, outcomes, memory))
            finally:
                alive = server.process.poll() is None
                found = {"alive": alive, **summary(outcomes, memory)}
                if options.output:
                    write_results(
                        options.output, {"machine": describe(), "minutes": options.minutes, **found}
                    )
    except AnyDoorError as error:
        print(f"soak.py: {error}", file=sys.stderr)
        return 2
    if not alive:
        print("the server died")
    return 0 if report(found) and alive else 1


if __name__ == "__main__":
    sys.exit(main())

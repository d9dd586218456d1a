"""Are honest callers served while strangers attack? All kinds of attack at once, on this machine alone.

    python benchmarks/siege.py --bundle examples/anydoor-small --minutes 10

Three honest clients, each with a token of its own, ask for one picture after the other: alone, for a tenth of
the time, then under siege, then alone again. One attacker has a token, the others have none. The server has
its default limits. None of the honest requests may be lost, health must be green throughout, and memory must
stay within the documented bound. Attackers and server share the processor here, so times are printed, not
judged.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.support.attacker import CHECK, COMPOSITE, WATCH, Attacker, scan_bomb, tile_bomb
from benchmarks.support.bundle_option import add_bundle_option
from benchmarks.support.machine import describe
from benchmarks.support.numbers import positive
from benchmarks.support.results import require_writable, write_results
from benchmarks.support.server_process import CHANNEL_OPTIONS, ServerProcess, request, resident_bytes
from engines.errors import AnyDoorError
from runtime.imaging.decoding_cost import MAX_SCANS
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.memory import bound
from runtime.server.settings import Settings

_HONEST = ("alice", "bob", "carol")
_THEIRS = "mallory"
_STEPS = 10
_PATIENCE = 300.0
_PAUSE = 0.5
_NICE = 5
"""Attackers have machines of their own elsewhere; here they take what the server leaves them."""
_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]


@dataclass
class Phase:
    """What honest clients and the machine saw."""

    seconds: list[float] = field(default_factory=list)
    """Of each request that was answered."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Status -> requests."""
    health: Counter[str] = field(default_factory=Counter)
    """Answer -> times."""
    memory: list[int] = field(default_factory=list)
    """Resident bytes of the server and its processes."""

    def quantile(self, part: float) -> float:
        """Returns seconds within which this part of the requests was answered."""
        return sorted(self.seconds)[int(part * (len(self.seconds) - 1))] if self.seconds else math.nan


# --- attacks: each is called over and over, with an address, until the siege is over ----------------------


def half_sent(address: str, **headers: str) -> None:
    """Begin messages, and do not end them."""
    with Attacker(address) as attacker:
        for _ in range(60):
            attacker.message(attacker.open(COMPOSITE, **headers), bytes(1000), missing=1000)
        attacker.ended.wait(20.0)


def half_sent_with_token(address: str) -> None:
    """The same, let in."""
    half_sent(address, authorization=f"Bearer {_THEIRS}")


def probes(address: str) -> None:
    """Begin checks of health, and do not end them; watch it, too."""
    with Attacker(address) as attacker:
        for path in (CHECK, WATCH) * 30:
            attacker.open(path)
        attacker.ended.wait(20.0)


def resets(address: str) -> None:
    """Begin calls, and take them back."""
    with Attacker(address) as attacker:
        attacker.flood(COMPOSITE, 2000)
        time.sleep(_PAUSE)


def slow_readers(address: str) -> None:
    """Ask for pictures, and do not take them."""
    with Attacker(address, window=0) as attacker:
        content = request(1, 1).SerializeToString()
        for _ in range(4):
            attacker.message(attacker.open(COMPOSITE, authorization=f"Bearer {_THEIRS}"), content)
        attacker.ended.wait(60.0)


def bombs(address: str) -> None:
    """Send pictures that are dear to decode, cancelled before they are."""
    for content in _bombs():
        _send(address, content, 3.0)


@functools.cache
def _bombs() -> list[bytes]:
    messages = [request(2, 1) for _ in range(3)]
    for message, scene in zip(messages, (scan_bomb(), scan_bomb(4096, MAX_SCANS - 10), tile_bomb())):
        message.scene = scene
    return [message.SerializeToString() for message in messages]


def many_fields(address: str) -> None:
    """Send a message of a million fields."""
    _send(address, b"\x12\x00" * 1_000_000, 30.0)


def large_without_token(address: str) -> None:
    """Send large messages without a token."""
    _send(address, bytes(31 << 20), 30.0, token="nobody's")
    time.sleep(_PAUSE)


def greedy(address: str) -> None:
    """Ask for more than the queue holds."""
    with grpc.insecure_channel(address, _OPTIONS) as channel:
        stub: Any = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        metadata = (("authorization", f"Bearer {_THEIRS}"),)
        calls = [
            stub.Composite.future(request(seed, _STEPS), timeout=20.0, metadata=metadata)
            for seed in range(24)
        ]
        for call in calls:
            call.exception()


ATTACKS: Sequence[Callable[[str], None]] = (
    half_sent,
    half_sent_with_token,
    probes,
    resets,
    slow_readers,
    bombs,
    many_fields,
    large_without_token,
    greedy,
)


def _send(address: str, content: bytes, seconds: float, token: str = _THEIRS) -> None:
    options = [*_OPTIONS, ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options) as channel:
        method: Any = channel.unary_unary(COMPOSITE)
        metadata = (("authorization", f"Bearer {token}"),)
        method.future(content, timeout=seconds, metadata=metadata).exception()


def attack(address: str) -> None:
    """Attack in all ways at once, until this process is ended."""
    os.nice(_NICE)

    def repeat(one: Callable[[str], None]) -> None:
        while True:
            try:
                one(address)
            except (OSError, grpc.RpcError):
                time.sleep(_PAUSE)

    for one in ATTACKS:
        threading.Thread(target=repeat, args=(one,), daemon=True).start()
    threading.Event().wait()


# --- the honest -------------------------------------------------------------------------------------------


def observe(server: ServerProcess, seconds: float, seeds: Iterator[int]) -> Phase:
    """Let the honest clients work for a while. No two requests share a seed: what is kept helps none."""
    phase, until = Phase(), time.monotonic() + seconds
    threads = [threading.Thread(target=_ask, args=(server, name, until, phase, seeds)) for name in _HONEST]
    threads.append(threading.Thread(target=_probe, args=(server, until, phase)))
    for thread in threads:
        thread.start()
    while time.monotonic() < until and server.process.poll() is None:
        phase.memory.append(resident_bytes(server.process.pid))
        time.sleep(_PAUSE)
    for thread in threads:
        thread.join()
    return phase


def _ask(server: ServerProcess, name: str, until: float, phase: Phase, seeds: Iterator[int]) -> None:
    with grpc.insecure_channel(server.address, _OPTIONS) as channel:
        stub: Any = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        while time.monotonic() < until:
            began = time.monotonic()
            try:
                metadata = (("authorization", f"Bearer {name}"),)
                stub.Composite(request(next(seeds), _STEPS), timeout=_PATIENCE, metadata=metadata)
            except grpc.RpcError as error:
                phase.outcomes[error.code().name] += 1  # type: ignore[attr-defined]
            else:
                phase.outcomes["OK"] += 1
                phase.seconds.append(time.monotonic() - began)


def _probe(server: ServerProcess, until: float, phase: Phase) -> None:
    while time.monotonic() < until:
        with grpc.insecure_channel(server.address, _OPTIONS) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            try:
                status = health.Check(health_pb2.HealthCheckRequest(), timeout=10.0).status
                phase.health["green" if status == 1 else "not serving"] += 1
            except grpc.RpcError as error:
                phase.health[error.code().name] += 1  # type: ignore[attr-defined]
        time.sleep(_PAUSE)


def summary(before: Phase, siege: Phase, after: Phase) -> dict[str, Any]:
    """Figures of all phases: seconds, and bytes."""
    settings = Settings()
    phases = {"before": before, "siege": siege, "after": after}
    alone = Phase(before.seconds + after.seconds)
    return {
        "phases": {
            name: {
                "outcomes": phase.outcomes,
                "health": phase.health,
                "p50": phase.quantile(0.5),
                "p95": phase.quantile(0.95),
                "memory": max(phase.memory, default=0),
            }
            for name, phase in phases.items()
        },
        "times_alone": {str(part): siege.quantile(part) / alone.quantile(part) for part in (0.5, 0.95)},
        "growth": max(siege.memory, default=0) - max(before.memory, default=0),
        "bound": bound(
            settings.memory_for_requests, settings.workers, settings.max_pixels, settings.max_message_bytes
        ),
    }


def report(found: dict[str, Any]) -> bool:
    """Print a summary; returns whether nothing was lost, health was green and memory within its bound."""
    print(f"{'':<6} {'answered':>8} {'lost':>5} {'p50 s':>7} {'p95 s':>7} {'MB at most':>11}  health")
    for name, phase in found["phases"].items():
        lost = phase["outcomes"].total() - phase["outcomes"]["OK"]
        print(
            f"{name:<6} {phase['outcomes']['OK']:>8} {lost:>5} {phase['p50']:>7.2f} {phase['p95']:>7.2f} "
            f"{phase['memory'] / 1e6:>11.0f}  {dict(phase['health'])}"
        )
    for part, times in found["times_alone"].items():
        print(f"{float(part):.0%} were answered within {times:.2f} times the time alone")
    print(f"memory under siege: {found['growth'] / 1e6:+.0f} MB; the bound is {found['bound'] / 1e6:.0f} MB")
    is_served = all(
        set(phase["outcomes"]) == {"OK"} and set(phase["health"]) == {"green"}
        for phase in found["phases"].values()
    )
    return is_served and bool(found["growth"] <= found["bound"])


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_bundle_option(result)
    result.add_argument("--minutes", type=positive(float), default=10, metavar="M", help="default: 10")
    result.add_argument("--output", type=Path, metavar="FILE", help="results, as JSON")
    result.add_argument("--log", type=Path, metavar="FILE", help="where the server's log lines go")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if an honest request was lost or a bound was missed, or 2."""
    options = parser().parse_args(arguments)
    seconds, seeds = options.minutes * 60, itertools.count(1000)
    try:
        if options.output:
            require_writable(options.output)
        with tempfile.TemporaryDirectory() as folder:
            tokens = Path(folder) / "tokens"
            tokens.touch(0o600)
            tokens.write_text("\n".join((*_HONEST, _THEIRS)))
            with ServerProcess(options.bundle, f"--tokens={tokens}", log=options.log) as server:
                before = observe(server, seconds / 10, seeds)
                attackers = multiprocessing.get_context("spawn").Process(
                    target=attack, args=(server.address,)
                )
                attackers.start()
                try:
                    siege = observe(server, seconds * 4 / 5, seeds)
                finally:
                    attackers.kill()
                after = observe(server, seconds / 10, seeds)
                alive = server.process.poll() is None
    except AnyDoorError as error:
        print(f"siege.py: {error}", file=sys.stderr)
        return 2
    if not alive:
        print("the server died")
    found = summary(before, siege, after)
    if options.output:
        write_results(options.output, {"machine": describe(), "minutes": options.minutes, **found})
    return 0 if report(found) and alive else 1


if __name__ == "__main__":
    sys.exit(main())

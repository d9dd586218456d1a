"""Starting, stopping and reloading, in a process of its own: by signals, with callers who do not let go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.support.attacker import COMPOSITE, Attacker
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from tests.support.serving import PATIENCE, message

_LOADING = """
import sys, time
from runtime.cli import main
from runtime.compositor import Compositor

Compositor.{} = lambda *_, **__: time.sleep(3600)
sys.exit(main(sys.argv[1:]))
"""
"""A server that takes an hour to open its model, or to load its graphs."""


class Process:
    """`anydoor serve`, and the lines of its log."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []

    def wait_for(self, event: str) -> dict[str, Any]:
        """Reads the log up to a line, all of which is JSON."""
        assert self.process.stderr is not None
        for text in self.process.stderr:
            self.lines.append(json.loads(text))
            if self.lines[-1]["event"] == event:
                return self.lines[-1]
        raise AssertionError(f"'{event}' never came: {self.lines}")

    def end(self) -> int:
        """Waits for the end; returns the exit code."""
        assert self.process.stderr is not None
        self.lines += [json.loads(text) for text in self.process.stderr]
        return self.process.wait(PATIENCE)


@contextmanager
def serving(bundle: Path, *flags: str, slow: str = "") -> Iterator[Process]:
    """Starts a server, in a process group of its own.

    Args:
        bundle: of its model.
        flags: of the command.
        slow: the method of `Compositor` that takes an hour.
    """
    program = ["-c", _LOADING.format(slow)] if slow else ["-m", "runtime"]
    command = [sys.executable, *program, "serve", f"--bundle={bundle}", "--listen=127.0.0.1:0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield Process(process)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("slow", "event"), [("load", "loading"), ("load_graphs", "listening")])
def test_a_signal_ends_a_server_that_loads(
    tiny_bundle: Path, number: signal.Signals, slow: str, event: str
) -> None:
    """Whatever it is at. A terminal and a supervisor send the signal to all processes."""
    with serving(tiny_bundle, "--drain-seconds=0", slow=slow) as server:
        server.wait_for(event)
        os.killpg(server.process.pid, number)
        server.wait_for("stopped")
        assert server.end() == 0
        assert {line["level"] for line in server.lines} == {"info"}


def test_a_hang_up_while_the_model_is_opened_ends_nothing(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, slow="load") as server:
        server.wait_for("loading")
        server.process.send_signal(signal.SIGHUP)
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


def test_a_server_leaves_no_process_behind(tiny_bundle: Path) -> None:
    with serving(tiny_bundle) as server:
        server.wait_for("serving")
        decoders = psutil.Process(server.process.pid).children(recursive=True)
        assert decoders
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        _, alive = psutil.wait_procs(decoders, PATIENCE)
        assert not alive


def test_a_second_signal_ends_it_at_once(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--drain-seconds=3600", slow="load_graphs") as server:
        address = server.wait_for("listening")["addresses"][0]
        with grpc.insecure_channel(address) as channel:
            stub: Any = CompositorServiceStub(channel)
            asked = pb.CompositeStreamRequest(request=message())
            stream = stub.CompositeStream(asked, timeout=PATIENCE)
            assert next(stream).HasField("queued")  # accepted, and waits
            health = health_pb2_grpc.HealthStub(channel)
            for service, status in (("", 2), ("liveness", 1)):
                request = health_pb2.HealthCheckRequest(service=service)
                assert health.Check(request, timeout=PATIENCE).status == status
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_for("draining")["accepted"] == 1
            server.process.send_signal(signal.SIGTERM)
            assert server.end() == -signal.SIGTERM
            with pytest.raises(grpc.RpcError):
                list(stream)


def test_callers_who_do_not_let_go_do_not_hold_the_end(tiny_bundle: Path) -> None:
    """A hang-up reloads, and loses nothing. Then the server ends, whoever still watches or has sent half of a
    message; an hour to drain is for accepted requests alone."""
    with serving(tiny_bundle, "--drain-seconds=3600") as server:
        address = server.wait_for("listening")["addresses"][0]
        server.wait_for("serving")
        with grpc.insecure_channel(address) as channel, Attacker(address) as attacker:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == 1
            for _ in range(60):
                attacker.open(COMPOSITE)
            stub: Any = CompositorServiceStub(channel)
            call = stub.Composite.future(message(steps=20), timeout=PATIENCE)
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("reloaded")
            assert call.result().images
            server.process.send_signal(signal.SIGTERM)
            assert next(watch).status == 2
            assert server.end() == 0
        assert not [line for line in server.lines if line["level"] == "error"]


def test_a_log_that_nobody_reads_stops_no_call(tiny_bundle: Path) -> None:
    """A pipe holds 64 KiB, which is less than 200 lines."""
    with serving(tiny_bundle) as server:
        address = server.wait_for("listening")["addresses"][0]
        server.wait_for("serving")
        with grpc.insecure_channel(address) as channel:
            stub: Any = CompositorServiceStub(channel)
            for _ in range(400):
                assert stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE).max_batch == 4
            assert stub.Composite(message(steps=1), timeout=PATIENCE).images
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert len([line for line in server.lines if line["event"] == "request ended"]) == 401

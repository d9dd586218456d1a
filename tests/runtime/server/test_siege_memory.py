"""Callers who want more memory than there is: every byte of theirs is counted, and given back."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from benchmarks.support.attacker import Attacker
from benchmarks.support.server_process import ServerProcess
from engines.bundle import Bundle
from engines.engine import needed_bytes
from engines.options import EngineOptions
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.events import MemoryFullError
from runtime.server.memory import Ledger, bound, request_bytes
from runtime.server.settings import Settings
from tests.support.serving import OBJECT, PATIENCE, ServerThread, message, png, scene_array, wait_until


def test_nobody_takes_more_than_half_of_what_the_others_leave() -> None:
    ledger = Ledger(1000)
    greedy = [ledger.open("greedy") for _ in range(3)]
    greedy[0].add(300)
    greedy[1].add(200)
    with pytest.raises(MemoryFullError, match="try again"):
        greedy[2].add(1)
    modest = ledger.open("modest")
    modest.add(500)  # a single call may have all that is left: else the largest request never could
    with pytest.raises(MemoryFullError):
        ledger.open("third").add(1)
    greedy[0].close()
    greedy[0].close()
    assert (ledger.taken, ledger.most) == (700, 1000)
    greedy[0].add(100)  # too late
    assert ledger.taken == 700


def test_a_second_call_ends_what_a_single_one_may_take() -> None:
    ledger = Ledger(1000)
    first = ledger.open("client")
    first.add(900)
    second = ledger.open("client")
    with pytest.raises(MemoryFullError):
        first.add(1)
    second.close()
    first.add(100)
    assert ledger.taken == 1000


def test_nothing_is_kept_of_a_client_whose_calls_are_over() -> None:
    ledger = Ledger(1000)
    account = ledger.open("client")
    account.set(300)
    account.close()
    account.set(100)  # too late
    assert (ledger.taken, account.nbytes) == (0, 0)
    assert not ledger._of_client
    assert not ledger._accounts


def test_the_ledger_is_exact_when_threads_share_it() -> None:
    ledger = Ledger(10_000)

    def use() -> None:
        for size in range(200):
            account = ledger.open("client")
            try:
                account.add(size)
                account.set(size // 2)
            except MemoryFullError:
                pass
            account.close()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.taken == 0
    assert ledger.most <= ledger.capacity


def test_the_bound_is_the_one_in_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text("utf-8")

    def value(beginning: str, **values: int) -> int:
        formula = next(line.strip() for line in page.splitlines() if line.startswith(f"    {beginning}"))
        for written, meant in ((" MiB", " * 2**20"), (" x ", " * "), ("^", "**")):
            formula = formula.replace(written, meant)
        result: int = eval(formula, {}, values)
        return result

    limits = {"max_pixels": 11_000, "max_message_bytes": 700}
    assert value("request_memory +", request_memory=5, workers=3, **limits) == bound(5, 3, **limits)
    sizes = {"pixels": 1000, "masks": 2, "placements": 3, "drawn": 64, "images": 8}
    sizes |= {"scene": 10, "channels": 4, "metadata": 99}
    assert value("(scene + masks", **sizes) == request_bytes(**sizes)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
def test_threads_share_one_arena() -> None:
    """Without it each of them has its own."""
    code = """if True:
        import ctypes, sys, threading
        from runtime.server.memory import share_one_arena
        if sys.argv[1] == "one":
            share_one_arena()
        barrier = threading.Barrier(8)
        def work():
            kept = [bytearray(5000) for _ in range(100)]
            barrier.wait()
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        libc = ctypes.CDLL(None)
        libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
        libc.fflush(None)
    """
    alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    heaps = [
        subprocess.check_output([sys.executable, "-c", code, how], text=True, env=alone).count("<heap nr=")
        for how in ("one", "many")
    ]
    assert heaps[0] == 1 < heaps[1]


def test_requests_for_which_there_is_no_memory_come_back_later(tiny_bundle: Path) -> None:
    """Large pictures from one client, all at once, with memory for a few."""
    scene = png(scene_array(0, 512, 512))
    of_one = request_bytes(512 * 512, masks=0, placements=1, drawn=64 * 64, images=2)
    limits = {"request_memory": 5 * of_one, "max_message_bytes": 1 << 20, "queue": 64}
    with ServerThread(tiny_bundle, **limits) as server, grpc.insecure_channel(server.address) as channel:
        stub: Any = CompositorServiceStub(channel)
        request = message(steps=1, scene=scene, num_images=2)
        calls = [stub.Composite.future(request, timeout=PATIENCE) for _ in range(12)]
        errors = [call.exception() for call in calls]
        refused = [error for error in errors if error]
        assert all(error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED for error in refused)
        assert all("memory" in error.details() for error in refused)
        assert 0 < len(refused) < len(calls)
        ledger = server.server.ledger
        assert of_one < ledger.most <= ledger.capacity
        wait_until(lambda: ledger.taken == 0)
        assert stub.Composite(request, timeout=PATIENCE).images


@pytest.mark.parametrize("method", ["Composite", "CompositeStream"])
def test_who_does_not_take_an_answer_is_cut_off(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    # what a connection takes at first is 64 KiB
    request: Any = message(steps=1, scene=png(scene_array(0, 100, 100)), num_images=4)
    if method == "CompositeStream":
        request = pb.CompositeStreamRequest(request=request)
    with (
        caplog.at_level("INFO"),
        ServerThread(tiny_bundle, transfer_seconds=0.5) as server,
        Attacker(server.address, window=0) as attacker,
        grpc.insecure_channel(server.address) as channel,
    ):
        stream = attacker.open(f"/anydoor.v1.CompositorService/{method}")
        attacker.message(stream, request.SerializeToString())
        assert attacker.ended.wait(PATIENCE)
        wait_until(lambda: server.server.ledger.taken == 0)
        stub: Any = CompositorServiceStub(channel)
        assert stub.Composite(message(steps=1), timeout=PATIENCE).images
    ended = [record.fields for record in caplog.records if record.message == "request ended"]  # type: ignore[attr-defined]
    assert [fields["code"] for fields in ended] == ["DEADLINE_EXCEEDED", "OK"]
    assert "was not taken" in ended[0]["reason"]


@pytest.mark.nightly
def test_resident_memory_keeps_to_the_bound(tiny_bundle: Path) -> None:
    """As many requests as large as the limits allow, of a server in a process of its own."""
    psutil = pytest.importorskip("psutil")
    mask = np.zeros((1000, 1000, 3), np.uint8)
    mask[200:600, 200:600] = 255
    placement = pb.Placement(reference=OBJECT, mask=png(mask))
    request = message(
        steps=1, scene=png(scene_array(0, 1000, 1000)), placements=[placement] * 4, num_images=8
    )
    limits = {
        "max-pixels": 10**6,
        "max-message-bytes": 4 * 10**6,
        "request-memory": 3 * 10**8,
        "cache-bytes": 0,
    }
    flags = [f"--{name}={value}" for name, value in limits.items()]
    with (
        ServerProcess(tiny_bundle, *flags) as server,
        # eight pictures take 12 MB
        grpc.insecure_channel(server.address, [("grpc.max_receive_message_length", -1)]) as channel,
    ):
        stub: Any = CompositorServiceStub(channel)
        assert stub.Composite(message(steps=1), timeout=PATIENCE).images
        process = psutil.Process(server.process.pid)

        def resident() -> int:
            family = [process, *process.children(recursive=True)]
            return sum(each.memory_info().rss for each in family)

        before = most = resident()
        calls = [stub.Composite.future(request, timeout=PATIENCE) for _ in range(20)]
        while not all(call.done() for call in calls):
            most = max(most, resident())
            time.sleep(0.05)
        assert any(not call.exception() for call in calls)
        assert most - before <= bound(3 * 10**8, Settings.workers, 10**6, 4 * 10**6)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_models_that_take_turns_keep_to_the_budget(small_bundle: Path) -> None:
    """Two under a budget that holds one, with OpenVINO: the most that the process ever had resident."""
    pytest.importorskip("openvino")
    options = EngineOptions("openvino", "cpu")
    budget = int(1.1 * needed_bytes(Bundle.open(small_bundle), options))
    flags = [f"--bundle=b={small_bundle}", "--backend=openvino", "--device=cpu", f"--memory-budget={budget}"]
    with (
        ServerProcess(Path(f"a={small_bundle}"), *flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub: Any = CompositorServiceStub(channel)
        for model in "babab":
            assert stub.Composite(message(steps=1, model=model), timeout=10 * PATIENCE).images
        status = Path(f"/proc/{server.process.pid}/status").read_text("ascii")
    most = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert most
    assert int(most[1]) * 1024 <= budget

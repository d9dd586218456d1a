"""Clients that are told to come again do so; and every call names the client's model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from runtime.client import Client
from runtime.errors import InputError
from runtime.request import Edit, Placement, Remove, Request, Sampling, Where
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.events import QueueFullError, ShuttingDownError
from tests.support.serving import BOX, OBJECT, PATIENCE, SCENE, ServerThread, message, wait_until

PLACEMENT = Placement(OBJECT, box=BOX)


@pytest.mark.parametrize("padding", [0, 2 << 20], ids=["small", "large"])
def test_a_full_queue_is_tried_again(tiny_bundle: Path, padding: int) -> None:
    """Also when the request is larger than gRPC keeps for a retry unless told."""
    with (
        ServerThread(tiny_bundle, max_batch=1, queue=0) as server,
        server.client() as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        server.engine.hold()
        stub: Any = CompositorServiceStub(channel)
        first = stub.Composite.future(message(steps=2), timeout=PATIENCE)
        server.engine.wait_for_steps(1)
        submit, refusals = server.batcher.submit, []

        def watched(*arguments):  # type: ignore[no-untyped-def]
            try:
                return submit(*arguments)
            except QueueFullError as error:
                refusals.append(error)
                server.engine.release()
                # the place is free before the client hears that it is not
                wait_until(lambda: not server.batcher.tickets)
                raise

        server.batcher.submit = watched  # type: ignore[method-assign]
        # what follows the end of a PNG is not looked at
        request = Request(SCENE + b"\0" * padding, [PLACEMENT], 7, Sampling(steps=1))
        assert len(client.run(request)) == 1
        assert len(refusals) == 1
        assert first.result().images


def test_a_server_that_is_not_available_is_tried_again(tiny_bundle: Path) -> None:
    """As one of several behind an address is when it ends: the next may be another."""
    with ServerThread(tiny_bundle) as server, server.client() as client:
        submit, refusals = server.batcher.submit, []

        def ending_at_first(*arguments):  # type: ignore[no-untyped-def]
            if not refusals:
                refusals.append(ShuttingDownError())
                raise refusals[0]
            return submit(*arguments)

        server.batcher.submit = ending_at_first  # type: ignore[method-assign]
        assert len(client.run(Request(SCENE, [PLACEMENT], 7, Sampling(steps=1)))) == 1
        assert len(refusals) == 1


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle) as server:
        yield server


CALLS: dict[str, Callable[[Client], object]] = {
    "run": lambda client: client.run(Request(SCENE, [PLACEMENT])),
    "draw": lambda client: client.draw("a cup"),
    "stream": lambda client: list(client.stream(Request(SCENE, [PLACEMENT]))),
    "edit": lambda client: client.edit(Edit(SCENE, Where(mask=np.ones((64, 80), bool)), Remove())),
    "info": lambda client: client.model_info(),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_for_the_model_of_the_client(server: ServerThread, call: str) -> None:
    with server.client(model="nobody") as client, pytest.raises(InputError, match="nobody"):
        CALLS[call](client)

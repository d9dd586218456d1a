"""Requests over HTTP that end in every way: finished, streamed, left half-way, malformed, and as jobs."""

from __future__ import annotations

import base64
import http.client
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runtime.rpc import compositor_pb2 as pb
from runtime.server.http.messages import plain

KINDS = {
    "HTTP": {"OK", "RESOURCE_EXHAUSTED"},
    "HTTP streamed": {"OK", "RESOURCE_EXHAUSTED"},
    "HTTP left half-way": {"LEFT", "RESOURCE_EXHAUSTED"},
    "HTTP malformed": {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"},
    "job": {"OK", "RESOURCE_EXHAUSTED"},
    "job cancelled": {"LEFT", "RESOURCE_EXHAUSTED"},
    "edit as a job": {"OK", "RESOURCE_EXHAUSTED"},
}
"""Kind of request -> how it may end."""

_PATIENCE = 120.0
_EVENTS = {"accept": "text/event-stream"}


class HttpCaller:
    """Sends requests of all kinds, one after the other; it blocks, so give it a thread."""

    def __init__(self, address: str, seed: int) -> None:
        """Begins with nothing sent.

        Args:
            address: host:port of the server.
            seed: of what is left to chance.
        """
        self._address = address
        self._random = random.Random(seed)

    def send(self, kind: str, message: pb.CompositeRequest) -> str:
        """Sends a request, and returns how it ended: a status of gRPC, LEFT or LOST.

        Args:
            kind: one of `KINDS`.
            message: what is asked for.
        """
        fields = {**plain(message), "preview_every": 3}
        if kind == "HTTP malformed":
            fields["scene"] = fields["scene"][: self._random.randrange(len(fields["scene"]) - 20)]
        if kind == "edit as a job":
            where = {"mask": fields["placements"][0]["reference"]}
            fields = {"scene": fields["placements"][0]["reference"], "where": where, "remove": True}
        if "job" in kind:
            return self._job(kind, fields)
        streamed = kind in ("HTTP streamed", "HTTP left half-way")
        with self._ask("POST", "/v1/composite", fields, _EVENTS if streamed else {}) as answer:
            if answer.status != http.client.OK:
                return _refusal(answer)
            if not streamed:
                return _pictures(json.load(answer))
            for name, event in _events(answer):
                if kind == "HTTP left half-way" and name == "step_done":
                    return "LEFT"  # the connection is closed
                if name == "result":
                    return _pictures(event)
                if name == "error":
                    return str(event["error"]["code"]).upper()
        return "LOST"

    def _job(self, kind: str, fields: dict[str, Any]) -> str:
        with self._ask("POST", "/v1/jobs", fields) as answer:
            if answer.status != http.client.ACCEPTED:
                return _refusal(answer)
            path = f"/v1/jobs/{json.load(answer)['id']}"
        if kind == "job cancelled":
            with self._ask("DELETE", path) as answer:
                return "LEFT" if answer.status == http.client.OK else "LOST"
        with self._ask("GET", f"{path}/events", headers=_EVENTS) as answer:
            *_, (name, last) = _events(answer)
        if name != "succeeded":
            return str(last.get("error", {}).get("code", "LOST")).upper()
        with self._ask("GET", f"{path}/result") as answer:
            found = _pictures(json.load(answer)) if answer.status == http.client.OK else _refusal(answer)
        if self._random.random() < 0.5:  # the others stay until newer ones need the room
            with self._ask("DELETE", path):
                pass
        return found

    @contextmanager
    def _ask(
        self, method: str, path: str, fields: Any = None, headers: Any = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._address, timeout=_PATIENCE)
        try:
            body = None if fields is None else json.dumps(fields)
            connection.request(method, path, body, {"content-type": "application/json", **(headers or {})})
            yield connection.getresponse()
        finally:
            connection.close()


def _pictures(answer: Any) -> str:
    files = [base64.b64decode(image["image"]) for image in answer["images"]]
    return "OK" if files and all(files) else "LOST"


def _refusal(answer: http.client.HTTPResponse) -> str:
    return str(json.load(answer)["error"]["code"]).upper()


def _events(answer: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    """Yields name and fields of the events of a stream, as they come."""
    name = ""
    for line in answer:
        key, _, value = line.decode().rstrip("\n").partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield name, json.loads(value)

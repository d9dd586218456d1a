"""Requests over HTTP in tests, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.serving import PATIENCE


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[tuple[str, Any]]:
        """Name and fields of the events of a stream, without comments."""
        blocks = self.content.decode().strip().split("\n\n")
        parts = [block.split("\n") for block in blocks if not block.startswith(":")]
        return [
            (name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts
        ]


def request(
    address: str, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def get(address: str, path: str, **headers: str) -> Answer:
    return request(address, "GET", path, headers=headers)


def post(address: str, path: str, fields: object, **headers: str) -> Answer:
    """With a body of JSON."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return request(
        address, "POST", path, json.dumps(fields).encode(), {"content-type": "application/json", **named}
    )


def post_form(address: str, path: str, fields: list[tuple[str, str | bytes]], **headers: str) -> Answer:
    """With a form, whose bytes are files."""
    body, kind = multipart(fields)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return request(address, "POST", path, body, {"content-type": kind, **named})


def multipart(fields: list[tuple[str, str | bytes]]) -> tuple[bytes, str]:
    """A form as a body, and its content type."""
    boundary = uuid.uuid4().hex
    parts = []
    for name, value in fields:
        is_file = isinstance(value, bytes)
        file = '; filename="file.png"\r\nContent-Type: image/png' if is_file else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts += [head.encode(), value if isinstance(value, bytes) else value.encode(), b"\r\n"]
    body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
    return body, f"multipart/form-data; boundary={boundary}"

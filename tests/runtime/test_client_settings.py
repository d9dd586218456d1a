"""What a client is made with, and cannot use: refused before anything is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.client import Client, Tls
from runtime.errors import InputError

NOBODY = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tls": Tls(ca=Path("none.pem"))}, r"cannot read 'none\.pem'"),
        ({"tls": Tls(ca=Path(__file__))}, "has no certificate in PEM"),
        ({"tls": Tls(None, Path(__file__), Path(__file__))}, "are not a certificate and its key"),
        ({"token": "two\nlines"}, "the token is not one line of ASCII"),
        ({"model": "\udcff"}, "the server's model '.udcff' has characters that are none"),
    ],
)
def test_settings_that_no_client_has(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Client(NOBODY, **given)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e300])
def test_a_time_in_which_nothing_can_be_done(timeout: float) -> None:
    with Client(NOBODY) as client, pytest.raises(InputError, match="timeout must be more than 0"):
        client.model_info(timeout=timeout)

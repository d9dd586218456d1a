"""Draws pictures on a server, with the methods of a Compositor.

from runtime.client import Client

with Client("localhost:50051") as client:
    image = client.composite("desk.jpg", Placement("cup.png", box=(80, 60, 300, 260)), seed=7)

`AsyncClient` has the same methods for asyncio.
"""

from runtime.client.asynchronous import AsyncClient
from runtime.client.blocking import Client
from runtime.client.connection import ClientEvent, ServerError, StepCallback, Tls

__all__ = ["AsyncClient", "Client", "ClientEvent", "ServerError", "StepCallback", "Tls"]

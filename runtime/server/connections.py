"""Ends connections that gRPC holds: it offers no way to end one, nor a call that does not take its answer."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import sys
import urllib.parse
from contextlib import suppress

from runtime.server.settings import Settings

_OTHER_FILES = 128
"""Descriptors that are not connections: of the bundle, libraries, decoders, metrics and listening sockets."""
_DESCRIPTORS = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"


def most_connections(settings: Settings) -> int:
    """Returns the most connections per listener, limited by the file descriptors."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    doors = 2 if settings.http else 1
    return min(settings.max_connections, max(files - _OTHER_FILES, files // 2) // doors)


def host_of(peer: str) -> str:
    """Returns the host at the other end of a connection, from its address.

    Args:
        peer: as gRPC writes it, like "ipv4:10.0.0.1:4711" or "ipv6:%5B2001:db8::1%5D:4711".

    Returns:
        The address without the port; of IPv6 the first 64 bits, as a host has all that begin with them.
    """
    kind, _, address = urllib.parse.unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer
    try:
        found = _ip(address.rpartition(":")[0].strip("[]").partition("%")[0])
    except ValueError:
        return peer
    if isinstance(found, ipaddress.IPv6Address):
        return f"ipv6:{ipaddress.ip_network((found, 64), strict=False)}"
    return f"ipv4:{found}"


def cut_off(peer: str) -> bool:
    """Ends a TCP connection of this process, with all calls on it; returns whether it was found.

    gRPC owns the descriptor: a copy of it is shut down, which gRPC sees as if the other end were gone.
    """
    kind, _, address = urllib.parse.unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return False
    host, _, port = address.rpartition(":")
    wanted = _ip(host.strip("[]")), int(port)
    for name in os.listdir(_DESCRIPTORS):
        # a descriptor may be closed, or be another file, by the time that it is looked at
        with suppress(OSError), _copy(int(name)) as connection:
            found = connection.getpeername()
            if isinstance(found, tuple) and (_ip(found[0]), found[1]) == wanted:
                connection.shutdown(socket.SHUT_RDWR)
                return True
    return False


def _copy(descriptor: int) -> socket.socket:
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Returns an address; of IPv4, whichever way it is written."""
    found = ipaddress.ip_address(host)
    return getattr(found, "ipv4_mapped", None) or found

"""Proxies of the environment, as gRPC takes them: not for this machine, and named where one is in the way.

Source: gRPC, doc/environment_variables.md.
"""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import unquote, urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def is_local(address: str) -> bool:
    """Returns whether an address of gRPC, like localhost:50051 or unix:/path, is on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = _host(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def proxy_for(address: str) -> str:
    """Returns the variable of the environment that sends the connections to an address to a proxy, and which
    proxy, like "http_proxy (proxy:3128)"; empty if none does."""
    variable = next((name for name in _VARIABLES if os.environ.get(name)), "")
    exceptions = next((os.environ[name] for name in _EXCEPTIONS if os.environ.get(name)), "")
    if not variable or is_local(address) or proxy_bypass_environment(_host(address), {"no": exceptions}):
        return ""
    # without the user's name and password
    return f"{variable} ({urlsplit(os.environ[variable]).netloc.rpartition('@')[2]})"


def _host(address: str) -> str:
    """Returns the host of host:port, [host]:port, dns:///host:port or ipv4:host:port."""
    rest = unquote(address).rpartition("/")[2]
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        rest = rest.removeprefix(scheme)
    if rest.startswith("["):
        return rest[1:].partition("]")[0]
    return rest if rest.count(":") > 1 else rest.partition(":")[0]

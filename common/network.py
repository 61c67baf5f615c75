"""Which network interface reaches the other ranks. No torch."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def choose_interface() -> None:
    """Tell gloo the interface that leads to rank 0, unless the user has named one or rank 0 is on loopback.

    Left alone, gloo listens on the address that this machine's own name stands for. Many systems put the name beside
    127.0.0.1 or 127.0.1.1 in /etc/hosts, and then ranks of other nodes cannot connect. The name of the interface may
    differ from node to node, so each finds its own.
    """
    if VARIABLE not in os.environ and (name := interface_towards(os.environ.get("MASTER_ADDR", ""))) is not None:
        os.environ[VARIABLE] = name


def interface_towards(host: str) -> str | None:
    """The interface from which packets to ``host`` leave, or that has its address; None where it is the loopback, the
    name stands for nothing or the address is not IPv4.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # of a datagram socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127."):
        return None
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == own), None)


def _address_of(interface: str) -> str | None:
    """Its first IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None  # it has none
    return socket.inet_ntoa(reply[20:24])

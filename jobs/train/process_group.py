"""The process group of training workers on several machines without GPUs.

Gloo listens on the address that the machine's own name stands for. In many an /etc/hosts that is a loopback address, which
the workers of other machines try in vain; so it is told the interface that the machine talks to Ray by.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import Any

import ray
from ray.train.torch import TorchConfig

_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915
"""Linux's request for the address of an interface (netdevice(7))."""


class MultiNodeTorchConfig(TorchConfig):
    """Ray's own, but that workers of different machines find each other."""

    @property
    def backend_cls(self) -> Any:
        """What Ray sets the workers up with."""
        return _GlooInterfaceBackend


class _GlooInterfaceBackend(TorchConfig().backend_cls):  # type: ignore[misc]  # Ray does not say its type
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            worker_group.execute(_use_interface_of_node)
        super().on_start(worker_group, backend_config)


def _use_interface_of_node() -> None:
    found = interface_with_address(ray.util.get_node_ip_address())
    if found is not None:
        os.environ.setdefault(_VARIABLE, found)


def interface_with_address(address: str) -> str | None:
    """The name of the interface that has an IPv4 address on this machine, if one has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no address, or this system another request
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None

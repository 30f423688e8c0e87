"""The process group of training workers on several machines without GPUs.

Gloo listens on the address that the machine's host name resolves to. In many /etc/hosts files that is a loopback address, which
workers on other machines cannot reach. So Gloo is configured to use the interface that has the machine's address in Ray.
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
"""Environment variable from which Gloo reads the name of its network interface."""
_SIOCGIFADDR = 0x8915
"""Number of the Linux ioctl request for the address of an interface (netdevice(7))."""


class MultiNodeTorchConfig(TorchConfig):
    """Ray's `TorchConfig` with a Gloo interface that other machines can reach."""

    @property
    def backend_cls(self) -> Any:
        """Class that sets up the process group of the workers."""
        return _GlooInterfaceBackend


class _GlooInterfaceBackend(TorchConfig().backend_cls):  # type: ignore[misc]  # Ray does not annotate its type
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            worker_group.execute(_use_interface_of_node)
        super().on_start(worker_group, backend_config)


def _use_interface_of_node() -> None:
    interface = interface_with_address(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault(_VARIABLE, interface)


def interface_with_address(address: str) -> str | None:
    """Return the name of this machine's network interface with the IPv4 ``address``; None if none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # the interface has no IPv4 address, or the system does not support the request
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None

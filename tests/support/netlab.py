"""Networks for tests: a host of its own for a service, and an outside that it is connected to.

```
 namespace "host":  service, its bridge, containers ── up0 198.51.100.2 ═══ 198.51.100.1 ── namespace "outside":
                                                                            203.0.113.5, 169.254.169.254: servers
```

The machine's own network is never touched: its routes, its rules and its switches are those of another namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest

UPLINK, ROUTER = "198.51.100.2", "198.51.100.1"
FAR, METADATA = "203.0.113.5", "169.254.169.254"
"""Addresses of the host in the outside's network, of the outside's router, and of two servers behind it."""

PORT, DNS_PORT = 8000, 53
ANSWER = "192.0.2.77"
"""What the outside's resolver says to every question."""

_CLONE_NEWNET = 0x40000000
_ALL_PROTOCOLS = 3  # ETH_P_ALL
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


_OWN_SYSFS = """\
mount --rbind /sys/fs/cgroup /mnt
mount -t sysfs sysfs /sys
mount --rbind /mnt /sys/fs/cgroup
umount -l /mnt
if grep -qw securityfs /proc/filesystems; then mount -t securityfs securityfs /sys/kernel/security; fi
exec "$@"
"""


class Namespace:
    """One network namespace, by its path."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path("/run/netns") / name
        subprocess.run(["ip", "netns", "add", name], check=True)
        self.run("ip", "link", "set", "lo", "up")

    def command(self, *arguments: str) -> list[str]:
        """Return a command that runs in it; with this process's mounts, unlike `ip netns exec`."""
        return ["nsenter", f"--net={self.path}", *arguments]

    def service_command(self, *arguments: str) -> list[str]:
        """Return a command that runs in it with a /sys of its own: liblxc looks there for bridges, and for AppArmor."""
        return self.command("unshare", "--mount", "--propagation", "slave", "sh", "-ec", _OWN_SYSFS, "sh", *arguments)

    def run(self, *arguments: str, text: str = "") -> str:
        done = subprocess.run(self.command(*arguments), input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    def devices(self) -> list[str]:
        return [link["ifname"] for link in json.loads(self.run("ip", "-json", "link", "show")) if link]

    def tables(self) -> list[str]:
        return self.run("nft", "list", "tables").splitlines()

    def inside(self, action: Callable[[], T]) -> T:
        """Return what *action* returns in it; a socket that it makes stays of that namespace."""
        return inside(self.path, action)

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], check=True)


def inside(namespace: Path, action: Callable[[], T]) -> T:
    """Return what *action* returns in the network namespace of that path."""
    results: list[T] = []
    errors: list[BaseException] = []

    def go_and_act() -> None:
        try:
            with namespace.open("rb") as file:
                assert _libc.setns(file.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            results.append(action())
        except BaseException as error:  # noqa: BLE001  # it is raised in the test's thread
            errors.append(error)

    thread = threading.Thread(target=go_and_act)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class NetLab:
    """A host and an outside, gone with their `with`."""

    def __init__(self) -> None:
        mark = secrets.token_hex(3)
        self._stack = contextlib.ExitStack()
        self.host = Namespace(f"lxpt-{mark}-host")
        self._stack.callback(self.host.remove)
        self.outside = Namespace(f"lxpt-{mark}-out")
        self._stack.callback(self.outside.remove)
        self.host.run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "out0", "netns", self.outside.name)
        self.host.run("ip", "address", "add", f"{UPLINK}/24", "dev", "up0")
        self.host.run("ip", "link", "set", "up0", "up")
        self.host.run("ip", "route", "add", "default", "via", ROUTER)
        self.outside.run("ip", "address", "add", f"{ROUTER}/24", "dev", "out0")
        self.outside.run("ip", "link", "set", "out0", "up")
        for address in (FAR, METADATA):
            self.outside.run("ip", "address", "add", f"{address}/32", "dev", "lo")
        self.serve(self.outside, FAR, PORT)
        self.serve(self.outside, METADATA, 80)
        self.resolve(self.outside, FAR)

    def serve(self, where: Namespace, address: str, port: int) -> None:
        """Tell whoever connects from which address that was."""
        listener = where.inside(lambda: socket.create_server((address, port)))

        def answer(_listener: socket.socket) -> None:
            connection, (peer, _port) = listener.accept()
            with connection:
                connection.sendall(f"{peer}\n".encode())

        self._keep_answering(listener, answer)

    def resolve(self, where: Namespace, address: str) -> None:
        """Have a resolver that knows one answer: to every question for an address, ANSWER."""

        def bind() -> socket.socket:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((address, DNS_PORT))
            return sock

        def answer(sock: socket.socket) -> None:
            query, peer = sock.recvfrom(512)
            if peer is None:
                raise OSError(errno.ESHUTDOWN, "closed")
            question = query[12 : query.find(0, 12) + 5]
            is_a = question[-3:-2] == b"\1"  # the low byte of the type: A
            header = query[:2] + bytes.fromhex("8180 0001" + ("0001" if is_a else "0000") + "0000 0000")
            record = bytes.fromhex("c00c 0001 0001 0000003c 0004") + socket.inet_aton(ANSWER) if is_a else b""
            sock.sendto(header + question + record, peer)

        self._keep_answering(where.inside(bind), answer)

    def _keep_answering(self, sock: socket.socket, answer: Callable[[socket.socket], None]) -> None:
        def loop() -> None:
            with contextlib.suppress(OSError):  # it is closed at the end
                while True:
                    answer(sock)

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()

        def end() -> None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
            thread.join(5)

        self._stack.callback(end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Tap:
    """What goes over a network device, in both directions, from when this is made."""

    def __init__(self, namespace: Path, device: str) -> None:
        def bind() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
            sock.bind((device, 0))
            return sock

        self._socket = inside(namespace, bind)

    def until(self, marker: bytes, timeout: float = 10.0) -> list[bytes]:
        """Return the frames that came before one with *marker* in it, which has to come."""
        seen = []
        self._socket.settimeout(timeout)
        while marker not in (frame := self._socket.recv(4096)):
            seen.append(frame)
        return seen

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def greeted(where: Namespace, address: str, port: int) -> bool:
    """Whether a server there says hello to somebody in a namespace."""
    command = where.command("busybox", "nc", "-w", "5", address, str(port))
    return subprocess.run(command, capture_output=True, check=False).stdout == b"hello\n"


def json_of(text: str) -> Any:
    return json.loads(text)


@pytest.fixture(scope="module")
def lab(images: Path) -> Iterator[NetLab]:
    """A host and an outside for the tests of a module; for folders whose conftest.py imports it."""
    assert images.exists()  # it is asked for first: it skips where containers can't be
    with NetLab() as lab:
        yield lab

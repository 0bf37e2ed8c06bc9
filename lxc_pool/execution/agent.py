"""The agent: a small process that forks a supervisor for every user who runs commands.

 service ──packets: a supervisor's end of its connection──► agent ──fork──► supervisors (see `supervisor`)

Separate from the service, because a fork of a process with threads and much memory is neither safe nor quick. It ends
when the service's end of its connection closes; supervisors end with the last of their commands. One thread.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import traceback

from lxc_pool.execution import cgroups, namespaces, packets
from lxc_pool.execution.protocol import ProtocolError
from lxc_pool.execution.supervisor import supervise


def serve(service: socket.socket, mounts: cgroups.Mounts) -> None:
    """Fork a supervisor for each connection that *service* sends, until that is closed; see `cgroups.mounted`."""
    while True:
        try:
            packet = packets.receive(service)
        except ProtocolError as exc:
            sys.stderr.write(f"lxc_pool agent: {exc}\n")
            continue
        except ConnectionError:
            return
        if packet is None:
            return
        _, fds = packet
        try:
            (orders,) = fds
            if not os.fork():
                supervise(socket.socket(fileno=orders), mounts)
        except (OSError, ValueError):  # whoever is at the other end sees it closed
            traceback.print_exc()
        finally:
            for fd in fds:
                os.close(fd)


def main(fd: int) -> None:
    """Be the agent of the service at the other end of *fd*."""
    namespaces.set_undumpable()
    for signum in range(1, signal.NSIG):
        # what a command inherits: Python ignores SIGPIPE and SIGXFSZ, the service may ignore others
        with contextlib.suppress(OSError, ValueError):
            signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps supervisors
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # commands get the container's own limits
    mounts = cgroups.mounted()
    gc.disable()
    gc.freeze()  # a collection in a fork would copy every page it marks
    serve(socket.socket(fileno=fd), mounts)


if __name__ == "__main__":
    main(int(sys.argv[1]))

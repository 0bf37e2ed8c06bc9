"""The usher: it goes ahead into a container's cgroups, and forks every command there.

 supervisor ──request, streams, report socket──► usher        in the container's v1 cgroups, else on the host
     ▲                                             │ clone3(CLONE_PARENT | CLONE_INTO_CGROUP), pid namespace
     └───────────────── is the parent of ──────► command      enters the rest and executes, see `entry`;
                                                              an operation stays out of the pid namespace

Joining v1 cgroups is what takes long (`cgroups`); the usher does it once for all commands of a container, and reads the
container's confinement once. It stays in the host's pid namespace: the container can neither see nor trace it. It ends
with its supervisor or with the container's init. One thread.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import stat
from typing import NoReturn

from lxc_pool.execution import cgroups, entry, namespaces, packets
from lxc_pool.execution.confinement import Confinement
from lxc_pool.execution.protocol import ExecRequest, Failed, ProtocolError, Started


def usher(requests: socket.socket, init_pid: int, pidfd: int, where: cgroups.Membership) -> NoReturn:
    """Go ahead to *where*, and fork commands until *requests* or the container ends.

    A request's descriptors are stdin, stdout, stderr, report and the command's cgroup. The answer goes to report:
    `Started` once the process exists, or `Failed`. Nothing is ever read from it; its end of file means
    that the request has been withdrawn.

    Args:
        requests: The connection to the supervisor.
        init_pid: The container's init.
        pidfd: The same.
        where: The container's cgroups.
    """
    code = 1
    try:
        namespaces.close_all_except((0, 1, 2, requests.fileno(), pidfd))
        poller = select.poll()
        poller.register(requests, select.POLLIN)
        door = _go_ahead(init_pid, pidfd, where)
        poller.register(pidfd, select.POLLIN)
        while all(fd != pidfd for fd, _ in poller.poll()) and (packet := packets.receive(requests)) is not None:
            _serve(packet, door)
        code = 0
    finally:
        os._exit(code)


def _go_ahead(init_pid: int, pidfd: int, where: cgroups.Membership) -> entry.Door | OSError:
    """Get ready; an error is for the requests to hear of.

    What can be done here is: a fork pays for each page that it touches first, 2 ms in all before this was so.
    """
    try:
        confinement = Confinement.read(init_pid)
        for directory in where.join:
            cgroups.enter(directory)
        if confinement.own_pids:
            namespaces.setns(pidfd, namespaces.CLONE_NEWPID)  # for children only
        # what was read above was init's: its pid can't have been reused while it lives
        signal.pidfd_send_signal(pidfd, 0)
        confinement.apply_to_usher()
    except OSError as exc:
        return exc
    return entry.Door(init_pid, pidfd, where.unified, confinement, confinement.changed_limits())


def _serve(packet: tuple[bytes, list[int]], door: entry.Door | OSError) -> None:
    payload, fds = packet
    stdin, stdout, stderr, report, cgroup = fds
    try:
        if isinstance(door, OSError):
            raise door
        request = ExecRequest.decode(payload, trusted=True)
        if entry.is_withdrawn(report):
            raise InterruptedError(errno.EINTR, "withdrawn")
        # what is to be mounted is no stream, and looking at it may take for ever
        _open_up((stdout,) if request.operation else (stdin, stdout, stderr))
        pid = _fork(cgroup, door, outside=request.operation)
        if not pid:
            entry.enter_and_exec(request, (stdin, stdout, stderr, report), cgroup, door)
        answer: Started | Failed = Started(pid)
    except ProtocolError as exc:
        answer = Failed(0, "enter", f"a malformed request: {exc}")
    except OSError as exc:
        answer = Failed(exc.errno or 0, "enter", f"entering the container: {exc}")
    try:
        os.write(report, answer.encode())
    except OSError:  # the supervisor has ended, or given the command up
        return
    finally:
        for fd in fds:  # the command's copy of report is now the last: its execve is the supervisor's end of file
            os.close(fd)


def _fork(cgroup: int, door: entry.Door, *, outside: bool) -> int:
    """Fork a command; *outside* the container's pid namespace if it is an operation, `operations` says why."""
    where = cgroup if door.unified else None
    if not outside or not door.confinement.own_pids:
        return namespaces.clone_sibling(where)
    own = os.pidfd_open(os.getpid())
    pid = 0
    try:
        namespaces.setns(own, namespaces.CLONE_NEWPID)
        pid = namespaces.clone_sibling(where)
        if not pid:
            return 0
    finally:
        os.close(own)
        try:
            namespaces.setns(door.pidfd, namespaces.CLONE_NEWPID)
        except OSError:  # the container has ended: no command may be forked any more, it would be outside
            if pid:
                os.kill(pid, signal.SIGKILL)  # our sibling, not reaped before its `Started`, which it won't get
            os._exit(1)
    return pid


def _open_up(streams: tuple[int, ...]) -> None:
    """Let the command open its own streams again, as `>/dev/stderr` does.

    A pipe belongs to the client's user alone, whom a container does not know. Who else could reach a pipe's inode, by
    /proc/PID/fd, may trace that process anyhow.
    """
    for fd in streams:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchmod(fd, 0o666)

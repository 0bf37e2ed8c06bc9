"""The way of a command into its container, from a fork of the supervisor's to execve(2).

The v2 cgroup is the one that it is born in (`clone3`), as is the pid namespace, which can't be changed afterwards; the
v1 cgroups and all other namespaces it enters by itself.

Outside nothing is left behind: every descriptor but the three streams, the report channel and the pidfd is closed
before the namespaces are entered, and the process stays undumpable until its program runs, so that nobody in the
container can borrow its memory or descriptors (CVE-2019-5736 and its kin).

`posix`, not `os`: tools that wrap `os.execve` or `os._exit` write files there, which here would be the container's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import posix
import signal
import socket
import stat
from typing import NamedTuple, NoReturn

from lxc_pool.execution import cgroups, identity, mounting, namespaces, operations, packets, strays, terminal
from lxc_pool.execution.confinement import Changes, Confinement
from lxc_pool.execution.protocol import OPENED, ExecRequest, Failed, Terminal

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UMASK = 0o022

_REPORT = 3  # descriptors of the command until execve; both are closed by it
_PIDFD = 4
_NULL_DEVICE = os.makedev(1, 3)


class Door(NamedTuple):
    """The way into a container.

    Attributes:
        init_pid: The container's init, which may have ended.
        pidfd: The same, and never another.
        where: Where it is; a command is born in its cgroup if that is unified, else it has to join it.
        tasks: Descriptors of the v1 cgroups that it has to join anyhow.
        confinement: The walls to put on.
        changes: Those of them that this process differs in.
    """

    init_pid: int
    pidfd: int
    where: cgroups.Membership
    tasks: tuple[int, ...]
    confinement: Confinement
    changes: Changes

    @classmethod
    def into(cls, init_pid: int, pidfd: int, where: cgroups.Membership, confinement: Confinement) -> Door:
        """Return the way into the container of *init_pid*, for forks of this process.

        Raises:
            OSError: It is no more, or there is no descriptor left.
        """
        tasks: list[int] = []
        try:
            tasks.extend(map(cgroups.open_tasks, where.join))
            return cls(init_pid, pidfd, where, tuple(tasks), confinement, confinement.changes())
        except BaseException:
            for fd in tasks:
                os.close(fd)
            raise

    def close(self) -> None:
        """Let go of what it holds: all but the pidfd."""
        for fd in self.tasks:
            os.close(fd)


def fork(request: ExecRequest, fds: tuple[int, int, int, int], cgroup: int, door: Door) -> tuple[int, int]:
    """Fork a command.

    Args:
        request: The command, or operation; which stays out of the container's pid namespace, `operations` says why.
        fds: Its streams, and a SOCK_SEQPACKET socket that `Failed` is sent on.
        cgroup: The directory of its own cgroup.
        door: The way in.

    Returns:
        Its pid, and a pidfd.

    Raises:
        OSError: The container has ended, or no process may be added.
    """
    # what is to be mounted is no stream, and looking at it may take for ever
    _open_up((fds[1],) if request.operation else fds[:3])
    if door.where.pids is not None:
        cgroups.check_limit(door.where.pids)
    outside = request.operation or not door.confinement.own_pids
    own = -1 if outside else os.pidfd_open(os.getpid())
    try:
        if not outside:
            namespaces.setns(door.pidfd, namespaces.CLONE_NEWPID)  # for children only
        try:
            pid, pidfd = namespaces.clone(cgroup if door.where.unified else None)
            if not pid:
                enter_and_exec(request, fds, cgroup, door)
        finally:
            if not outside:
                namespaces.setns(own, namespaces.CLONE_NEWPID)
    finally:
        if not outside:
            os.close(own)
    return pid, pidfd


def _open_up(streams: tuple[int, ...]) -> None:
    """Let the command open its own streams again, as `>/dev/stderr` does.

    A pipe belongs to the client's user alone, whom a container does not know. Who else could reach a pipe's inode, by
    /proc/PID/fd, may trace that process anyhow.
    """
    for fd in streams:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchmod(fd, 0o666)


def enter_and_exec(
    request: ExecRequest, fds: tuple[int, int, int, int], cgroup: int, door: Door
) -> NoReturn:  # pragma: no cover - it ends in another program and another file system: nothing can be recorded
    """Become the command, or report why not.

    Args:
        request: The command, or operation.
        fds: Its streams, and a SOCK_SEQPACKET socket that `Failed` is sent on.
        cgroup: The directory of its own cgroup.
        door: The way in.
    """
    stage, text = "enter", "entering the container"
    confinement, report = door.confinement, fds[3]
    try:
        _join_cgroups(door, cgroup)
        strays.put_on_mark()
        _arrange_descriptors((*fds, door.pidfd))
        report = _REPORT
        if request.operation:
            own_users = confinement.flags & namespaces.CLONE_NEWUSER
            operations.prepare(request.argv, door.init_pid, _PIDFD if own_users else None)
        os.setsid()
        confinement.apply_outside(door.changes)
        _enter(confinement.flags)
        _replace_null_devices()
        stage, text = "user", f"becoming user {request.user!r}"
        user = identity.ROOT if request.operation else identity.load(request.user)
        stage, text = "enter", "preparing the command"
        _take_terminal(request.terminal, user)
        confinement.apply_inside()
        stage, text = "user", f"becoming user {request.user!r}"
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        namespaces.set_undumpable()  # as in _enter
        stage, text = "cwd", request.cwd
        os.chdir(request.cwd.encode("utf-8", "surrogateescape"))
        stage, text = "exec", request.argv[0]
        os.umask(UMASK)
        # last, for a change of ids clears it; without its supervisor nobody could end the command any more
        namespaces.die_with_parent(signal.SIGKILL)
        if request.operation:
            posix.close(_REPORT)  # as execve(2) would: it has begun
            posix._exit(operations.perform(request.argv))  # noqa: SLF001 - as below
        execute(request.argv, environment(request.env, user))
    except mounting.Refusal as exc:
        failure = Failed(exc.number, "mount", exc.text)
    except identity.UnknownUser as exc:
        failure = Failed(0, "user", str(exc.args[0]))
    except OSError as exc:
        failure = Failed(exc.errno or 0, stage, text if stage in ("cwd", "exec") else f"{text}: {exc.strerror}")
    except BaseException as exc:  # noqa: BLE001 - a fork must never return into its parent's code
        failure = Failed(0, "enter", f"{text}: {exc!r}")
    try:
        posix.write(report, failure.encode())
    finally:
        posix._exit(127)  # noqa: SLF001 - that is its name


def environment(extra: dict[str, str], user: identity.Identity) -> dict[bytes, bytes]:
    """Return all that a command's environment holds: four defaults, and *extra* over them."""
    defaults = {"PATH": DEFAULT_PATH, "HOME": user.home, "USER": user.name, "LANG": "C.UTF-8"}
    return {
        name.encode("utf-8", "surrogateescape"): value.encode("utf-8", "surrogateescape")
        for name, value in (defaults | extra).items()
    }


def execute(argv: tuple[str, ...], env: dict[bytes, bytes]) -> NoReturn:
    """Replace this process by *argv*, looked for in *env*'s PATH unless it holds a slash.

    Raises:
        OSError: It can't be: that of the first file found, else that of the last place looked at, as execvpe(3).
    """
    args = [arg.encode("utf-8", "surrogateescape") for arg in argv]
    if not args[0]:
        raise FileNotFoundError(errno.ENOENT, "no program")
    if b"/" in args[0]:
        candidates = [args[0]]
    else:
        candidates = [(place or b".") + b"/" + args[0] for place in env.get(b"PATH", b"").split(b":")]
    found: OSError | None = None
    missing: OSError | None = None
    for path in candidates:
        try:
            posix.execve(path, args, env)
        except (FileNotFoundError, NotADirectoryError) as exc:
            missing = exc
        except OSError as exc:
            found = found or exc
    raise found or missing or FileNotFoundError(2, "no such command")


def _join_cgroups(door: Door, cgroup: int) -> None:  # pragma: no cover - as above
    for tasks in door.tasks:
        cgroups.enter(tasks)
    if not door.where.unified:
        cgroups.enter(cgroups.open_tasks(f"/proc/self/fd/{cgroup}"))


def _arrange_descriptors(fds: tuple[int, int, int, int, int]) -> None:  # pragma: no cover - as above
    # first out of the way, so that no target overwrites a source
    sources = fds if min(fds) > _PIDFD else [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _PIDFD + 1) for fd in fds]
    for target, source in enumerate(sources):
        posix.dup2(source, target, inheritable=target <= 2)
    namespaces.close_all_except((0, 1, 2, _REPORT, _PIDFD))


def _enter(flags: int) -> None:  # pragma: no cover - as above
    """Enter the container's namespaces, as its root."""
    namespaces.setns(_PIDFD, flags)
    posix.close(_PIDFD)
    if flags & namespaces.CLONE_NEWUSER:
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    namespaces.set_undumpable()  # a change of ids has reset it where fs.suid_dumpable is 1, proc_sys_fs(5)


def _take_terminal(wanted: Terminal | None, user: identity.Identity) -> None:  # pragma: no cover - as above
    """Open a terminal of the container if one is wanted, make it this session's, and send its master out.

    As the container's root: /dev/pts/ptmx need not be open to the command's user.
    """
    if wanted is None:
        return
    master, slave = terminal.open_pair()
    terminal.prepare(slave, wanted.rows, wanted.columns, user.uid)
    for stream in wanted.streams:
        posix.dup2(slave, stream)
    report = socket.socket(fileno=_REPORT)
    packets.send_beside(report, OPENED, master)
    report.detach()
    posix.close(slave)
    posix.close(master)


def _replace_null_devices() -> None:  # pragma: no cover - as above
    """Open the container's /dev/null instead of the host's, whose mode a privileged container's root could change."""
    for target in range(3):
        status = os.fstat(target)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL_DEVICE:
            fd = os.open("/dev/null", os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            opened = os.fstat(fd)
            if not stat.S_ISCHR(opened.st_mode) or opened.st_rdev != _NULL_DEVICE:
                raise OSError(errno.ENODEV, "the container's /dev/null is not the null device")
            posix.dup2(fd, target)
            posix.close(fd)

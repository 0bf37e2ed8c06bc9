"""Clone, start, probe and destroy containers with liblxc, in a lane's worker process.

```
 worker ── lxc-start (a short-lived child) ── monitor, child of nobody ── init of the container
```

The start goes through the `lxc-start` program because a daemonized start leaves its caller in the monitor's cgroup, and
a monitor that is a copy of a Python process is four times as large (both measured).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from lxc_pool.backend.lxc import (
    binding,
    console,
    container_config,
    discarded,
    layers,
    limits,
    probe,
    profile_mounts,
    removal,
    resolver,
    rootfs,
)
from lxc_pool.backend.protocol import Blueprint, Endpoint
from lxc_pool.errors import CloneFailed, ConfigError, DestroyFailed, ImageError, StartFailed
from lxc_pool.host import apparmor, cgroups, idranges, mounts, netlink, seccomp
from lxc_pool.host.processes import ProcessIdentity, has_executed, identify
from lxc_pool.images.store import Image, ImageStore, verify

log = logging.getLogger(__name__)

_LEAST_URGENT = 19
"""Niceness. Source: nice(2)."""

_EXEC_PAUSE = 0.0005
"""Seconds between two looks whether init has been executed. There is no event for it; nearly always it has."""

_END_TIMEOUT = 2
"""Seconds, in whole ones, for a monitor to end after its init; it takes a millisecond (measured)."""

_DEFAULT_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
"""What lxc-start is to treat by default, for init inherits that: Python ignores SIGPIPE and a worker ignores SIGINT."""

_ENVIRONMENT = {"PATH": "/nonexistent"}
"""Of lxc-start. With newuidmap on PATH liblxc uses it, which takes 1.8 times as long and knows /etc/subuid only."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_UNSAFE = re.compile(r"[^A-Za-z0-9/._+@=-]")


class LxcBackend:
    """A `Backend` that keeps its containers and images below one state dir.

    Attributes:
        lxcpath: The directory of the containers, in liblxc's sense.
    """

    def __init__(self, state_dir: Path, id_base: int = idranges.DEFAULT_BASE) -> None:
        """Name the state dir; nothing happens yet.

        Args:
            state_dir: Where everything is kept.
            id_base: The first id that containers may have.

        Raises:
            ConfigError: The path has a character that liblxc's overlay options can't carry.
        """
        if _UNSAFE.search(str(state_dir)) or not state_dir.is_absolute():
            raise ConfigError(
                f"the state dir must be an absolute path of A-Z a-z 0-9 / . _ + @ = -, not {str(state_dir)!r}"
            )
        self.lxcpath = state_dir / "containers"
        self._image_directory = state_dir / "images"
        self._id_base = id_base
        self._user_namespaces: dict[int, int] = {}
        self._cgroup_trees: tuple[cgroups.Hierarchy, ...] | None = None
        self._told_of_apparmor = False

    def open(self) -> None:
        """See `Backend.open`: what is mounted for a start is seen by this worker and the containers alone.

        From here on this process is under the containers' seccomp policy, which they inherit.
        """
        mounts.enter_private_namespace()
        seccomp.install(seccomp.compiled())
        self._cgroup_trees = cgroups.hierarchies()

    def prepare(self, image_name: str) -> Image:
        """See `Backend.prepare`."""
        try:
            return ImageStore(self._image_directory).ensure(
                image_name, lambda line: log.info("image %s: %s", image_name, line)
            )
        except OSError as error:
            raise ImageError(f"image {image_name!r} could not be built: {error}") from error

    def collect_images(self, keep: frozenset[str]) -> None:
        """See `Backend.collect_images`."""
        try:
            ImageStore(self._image_directory).collect(keep)
        except OSError as error:
            raise ImageError(f"old images could not be removed: {error}") from error

    def verify_image(self, image: Image, *, gently: bool) -> None:
        """See `Backend.verify_image`."""
        with _out_of_the_way() if gently else contextlib.nullcontext():
            verify(image)

    def create(self, blueprint: Blueprint) -> ProcessIdentity:
        """See `Backend.create`."""
        if self._cgroup_trees is None:
            raise StartFailed("this process is not open: its containers would have no seccomp policy")
        directory = self.lxcpath / blueprint.name
        try:
            return self._create(blueprint, directory, self._cgroup_trees)
        except StartFailed as error:
            if said := console.last_words(directory):
                raise StartFailed(f"{error}; its console's last words: {said}") from error
            raise

    def destroy(self, name: str, *, force: bool) -> None:
        """See `Backend.destroy`."""
        removal.remove(name, self.lxcpath, force=force)

    def leftovers(self) -> bool:
        """See `Backend.leftovers`."""
        return bool(discarded.names(self.lxcpath))

    def sweep(self) -> None:
        """See `Backend.sweep`."""
        problems = []
        for name in discarded.names(self.lxcpath):
            try:
                discarded.remove(self.lxcpath, name)
            except OSError as error:
                problems.append(f"{name}: {error}")
        discarded.remove_place(self.lxcpath)
        if problems:
            raise DestroyFailed(f"upper layers are not quite gone: {'; '.join(problems)[:1000]}")

    def disk_bound(self) -> str:
        """See `Backend.disk_bound`."""
        return layers.bound(self.lxcpath)[0]

    def newest(self, image_name: str) -> Image | None:
        """See `Backend.newest`."""
        return ImageStore(self._image_directory).newest(image_name)

    def log_tail(self, name: str) -> str:
        """See `Backend.log_tail`."""
        return words(self.lxcpath / name, "")

    def is_idle(self, name: str) -> bool:
        """See `Backend.is_idle`."""
        return cgroups.task_count(name) == 1

    def console_log(self, name: str) -> bytes:
        """See `Backend.console_log`."""
        return console.read(self.lxcpath / name)

    def names(self) -> tuple[str, ...]:
        """See `Backend.names`."""
        with contextlib.suppress(FileNotFoundError):
            return tuple(sorted(name for name in os.listdir(self.lxcpath) if not name.startswith(".")))
        return ()

    def _create(self, blueprint: Blueprint, directory: Path, trees: Sequence[cgroups.Hierarchy]) -> ProcessIdentity:
        """Do what `create` does."""
        try:
            first_id = self._clone(blueprint, directory)
            with rootfs.mounted(blueprint, directory, self._user_namespace(first_id), first_id or 0):
                if blueprint.endpoint is not None:
                    resolver.write(rootfs.path(directory), first_id or 0, blueprint.endpoint.resolvers)
                profile_mounts.put(
                    blueprint.profile.mounts, rootfs.path(directory), first_id or 0, lock=first_id is None
                )
                self._start(blueprint, directory)
        except OSError as error:
            if not blueprint.image.rootfs.is_dir():
                raise ImageError(f"base image {blueprint.image.ref} is gone: {error}") from error
            raise CloneFailed(f"can't clone {blueprint.name} from {blueprint.image.ref}: {error}") from error
        directories = cgroups.payload_cgroups(blueprint.name, trees)
        init = self._await_init(blueprint, directory, directories)
        try:
            _confine(blueprint, directories, trees)
        except StartFailed:
            self._require_running(blueprint, directory, init)  # or that is why
            raise
        self._require_running(blueprint, directory, init)
        if command := blueprint.profile.probe or blueprint.image.probe:
            self._probe(blueprint, command)
        return init

    def _clone(self, blueprint: Blueprint, directory: Path) -> int | None:
        """Make the container's directory; return the first of its ids, None if it is privileged."""
        directory.mkdir(mode=0o700)
        first_id = None
        rootfs.make_mount_point(directory)
        if not blueprint.profile.privileged:
            in_use = functools.partial(layers.in_use, self.lxcpath)
            first_id = idranges.take(str(directory), self._id_base, unless=in_use)
            layers.make(directory, first_id, blueprint.profile.disk)
            # The container's root goes through to its rootfs; other users of the host do not.
            os.chown(directory, -1, first_id)
            directory.chmod(0o710)
        # By rename, so that a clone cut short has either no configuration or a whole one.
        partial = directory / "config.partial"
        profile = None if blueprint.profile.privileged else self._apparmor_profile()
        text = container_config.render(blueprint, directory, first_id, profile)
        partial.write_text(text, encoding="ascii")
        partial.rename(directory / "config")
        return first_id

    def _apparmor_profile(self) -> str | None:
        """Return the AppArmor profile of an unprivileged container; None: liblxc's.

        It is looked for at each clone, since `setup` may load it at any time. If it goes before the container is up,
        liblxc refuses to start it.
        """
        if not apparmor.is_on():
            return None
        if apparmor.is_enforced(apparmor.PROFILE):
            self._told_of_apparmor = False
            return apparmor.PROFILE
        if not self._told_of_apparmor:
            self._told_of_apparmor = True
            log.warning(
                "the AppArmor profile %s is not enforced: containers run under liblxc's %s, in which systemd can't "
                "make its mounts; `lxc-pool setup` loads it",
                apparmor.PROFILE,
                apparmor.LIBLXC_PROFILE,
            )
        return None

    def _user_namespace(self, first_id: int | None) -> int | None:
        """Return a descriptor of a user namespace with that range, made once for each in each worker."""
        if first_id is None:
            return None
        if first_id not in self._user_namespaces:
            self._user_namespaces[first_id] = mounts.make_user_namespace(first_id, idranges.SIZE)
        return self._user_namespaces[first_id]

    def _start(self, blueprint: Blueprint, directory: Path) -> None:
        argv = ["lxc-start", "-P", str(self.lxcpath), "-n", blueprint.name, "-d"]
        actions = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
        try:
            pid = os.posix_spawnp(
                argv[0], argv, _ENVIRONMENT, file_actions=actions, setsigmask=(), setsigdef=_DEFAULT_SIGNALS
            )
        except FileNotFoundError as error:
            raise StartFailed(
                "lxc-start is not installed (Debian: `apt-get install lxc`), or not on the service's PATH"
            ) from error
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != 0:
            self._await_end(blueprint)
            raise StartFailed(f"{blueprint.name} did not start: {words(directory, f'lxc-start ended with {status}')}")

    def _await_init(self, blueprint: Blueprint, directory: Path, directories: Sequence[Path]) -> ProcessIdentity:
        """Return the container's init once it runs its own program: the cheapest sign that it really runs."""
        try:
            pid = cgroups.init_of(directories)  # as liblxc would say, in less than half the time
        except OSError as error:
            raise StartFailed(f"{blueprint.name} is up, but can't be looked at: {error}") from error
        if pid is None:
            raise self._stopped(blueprint, directory)
        try:
            init = identify(pid)
        except ProcessLookupError as error:
            raise self._stopped(blueprint, directory) from error
        while not self._require_running(blueprint, directory, init):
            if time.monotonic() > blueprint.deadline:
                raise StartFailed(
                    f"{blueprint.name} did not execute its init in time: {words(directory, 'no reason known')}"
                )
            time.sleep(_EXEC_PAUSE)  # there is no event for an exec; see _EXEC_PAUSE
        return init

    def _require_running(self, blueprint: Blueprint, directory: Path, init: ProcessIdentity) -> bool:
        """Return whether a container's init has executed its own program yet.

        Raises:
            StartFailed: It has ended.
        """
        try:
            return has_executed(init)
        except ProcessLookupError as error:
            raise self._stopped(blueprint, directory) from error

    def _stopped(self, blueprint: Blueprint, directory: Path) -> StartFailed:
        """Return the error for a container whose init has ended, once all is said about it."""
        self._await_end(blueprint)
        return StartFailed(f"{blueprint.name} stopped at once: {words(directory, 'its init ended')}")

    def _await_end(self, blueprint: Blueprint) -> None:
        """Wait until the monitor of a container whose init has ended is done: it writes down the console's rest."""
        binding.container(blueprint.name, self.lxcpath).wait("STOPPED", _END_TIMEOUT)

    def _probe(self, blueprint: Blueprint, command: Sequence[str]) -> None:
        """Run the profile's probe, or else the image's, until it succeeds or its time is up.

        What of it still runs in the container then goes with that.
        """
        profile = blueprint.profile
        variables = {"PATH": _PATH} | dict(profile.env)
        argv = ["lxc-attach", "-P", str(self.lxcpath), "-n", blueprint.name, "--clear-env"]
        argv += [word for name, value in variables.items() for word in ("-v", f"{name}={value}")]
        deadline = blueprint.deadline
        if profile.probe_timeout is not None:
            deadline = time.monotonic() + profile.probe_timeout
        failure = probe.run_until_success([*argv, "--", *command], deadline)
        if failure is not None:
            raise StartFailed(_printable(f"{blueprint.name} is up but its probe {list(command)} {failure}"))


def _confine(blueprint: Blueprint, directories: Sequence[Path], trees: Sequence[cgroups.Hierarchy]) -> None:
    """Check that the limits of a container that is up are in force, and close what liblxc leaves open."""
    if blueprint.endpoint is not None and blueprint.endpoint.isolated:
        _isolate(blueprint, blueprint.endpoint)
    try:
        if wrong := limits.problems(blueprint.profile, directories):
            raise StartFailed(f"{blueprint.name} is up without its limits: {'; '.join(wrong)}")
        limits.seal(blueprint.profile, directories, trees)
    except OSError as error:
        raise StartFailed(f"{blueprint.name} is up, but its cgroups could not be closed to it: {error}") from error


def _isolate(blueprint: Blueprint, endpoint: Endpoint) -> None:
    """Keep a container from its neighbours by the bridge's own means, too: rules can be flushed by somebody's hand."""
    try:
        netlink.isolate(endpoint.port)
    except OSError as error:
        raise StartFailed(f"{blueprint.name} is up, but could not be isolated on the bridge: {error}") from error


def words(directory: Path, otherwise: str) -> str:
    """Return what liblxc logged as errors for the container in *directory*, oldest first; *otherwise* if nothing."""
    try:
        lines = (directory / "lxc.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return otherwise
    # `lxc-start NAME 20240101120000.000 ERROR    start - ../src/lxc/start.c:lxc_spawn:1832 - No such file …`
    said = [line.split(" - ", 2)[-1].strip() for line in lines if " ERROR " in line]
    return _printable("; ".join(dict.fromkeys(said))[:1000]) or otherwise


def _printable(text: str) -> str:
    """Leave out what a terminal would obey: what a container says may be shown to an administrator."""
    return "".join(character if character.isprintable() else "?" for character in text.replace("\n", "; "))


@contextlib.contextmanager
def _out_of_the_way() -> Iterator[None]:
    """Take the CPU and the disk only when nobody else wants them.

    Source: setpriority(2), ioprio_set(2): both are about the calling thread, a worker's only one.
    """
    worker = psutil.Process()
    niceness, (kind, level) = worker.nice(), worker.ionice()
    worker.nice(_LEAST_URGENT)
    worker.ionice(psutil.IOPRIO_CLASS_IDLE)
    try:
        yield
    finally:
        worker.nice(niceness)
        worker.ionice(kind, level)

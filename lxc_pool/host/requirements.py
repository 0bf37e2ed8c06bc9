"""Find out what a host lacks for a pool of containers, and name the fix. Nothing is changed and nothing left behind."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lxc_pool.backend.lxc import layers
from lxc_pool.config import NetworkConfig
from lxc_pool.errors import BackendError, ConfigError, ImageError
from lxc_pool.host import apparmor as profiles
from lxc_pool.host import bridge, cgroups, firewall
from lxc_pool.images import busybox

_MIN_KERNEL = (5, 8)
"""pidfd_open is 5.3, setns with a pidfd 5.8. Source: pidfd_open(2), setns(2)."""

_IDMAP_KERNEL = (5, 19)
"""Overlay over an idmapped lower directory. Source: mount_setattr(2); Linux commit bc70682a497c."""

_MIN_LXC = (4, 0)
"""The first with `lxc.payload.NAME` and `lxc.monitor.NAME` cgroups. Source: release notes of LXC 4.0."""

_MIN_DESCRIPTORS = 4096
"""Open files a service of some hundred containers may need: 1024 are too few for 1 000 (measured); a guess above it."""

GOOD_INOTIFY = 1024
"""inotify instances of one user, those of its containers included. A guess; Linux's own is 128."""

_TIMEOUT = 5.0
"""Seconds for a program that takes some milliseconds."""

_OVERLAY = """\
mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged &&
rm merged/old && : >merged/new"""
"""Removing a file of the lower directory is what an upper one must support beyond holding files."""


@dataclasses.dataclass(frozen=True, slots=True)
class Requirement:
    """One thing that a host should have.

    Attributes:
        ok: Whether it has.
        detail: What was found.
        fix: What to do; empty if there is nothing to do.
        advice: The pool works without it, though not as well.
    """

    name: str
    ok: bool
    detail: str
    fix: str = ""
    advice: bool = False


def check(state_dir: Path, network: NetworkConfig | None = None, instance: str = "000000") -> tuple[Requirement, ...]:
    """Look at everything that the service needs on this host; about 20 ms.

    Args:
        state_dir: Where containers and images would be; it need not exist yet.
        network: The bridge that profiles want; None: none does.
        instance: The service's, whose bridge is in nobody's way.
    """
    found = (
        kernel(os.uname().sysname, os.uname().release),
        pidfds(),
        root(),
        lxc_programs(),
        python_binding(),
        static_busybox(),
        control_groups(),
        overlay(state_dir),
        upper_layers(state_dir),
        user_namespaces(),
        descriptors(),
        inotify(),
        changes_of_user(),
        apparmor(),
    )
    return found if network is None else (*found, bridge_network(network, instance))


def kernel(system: str, release: str) -> Requirement:
    """Check the kernel's version, given as uname(2) has it."""
    found = f"{system} {release}"
    version = _version(release)
    if system != "Linux" or version < _MIN_KERNEL:
        return Requirement("kernel", False, found, "use Linux 5.8 or later (pidfds for setns)")
    if version < _IDMAP_KERNEL:
        fix = "use Linux 5.19 or later, or privileged containers only (overlay over idmapped mounts)"
        return Requirement("kernel", False, found, fix, advice=True)
    return Requirement("kernel", True, found)


def pidfds() -> Requirement:
    """Check that the kernel gives pidfds, which a policy of whatever the service is confined by may refuse."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        fix = (
            "allow pidfd_open(2) in the seccomp policy that the service runs under: without it commands can't be run, "
            "and the ends of processes are looked for 20 times a second"
        )
        return Requirement("pidfds", False, f"pidfd_open: {error.strerror}", fix)
    return Requirement("pidfds", True, "pidfd_open works")


def root() -> Requirement:
    """Check that this process is root, as the service must be."""
    uid = os.geteuid()
    return Requirement("root", uid == 0, f"uid {uid}", "" if uid == 0 else "run the service, and this check, as root")


def lxc_programs() -> Requirement:
    """Check that `lxc-start`, `lxc-stop` and `lxc-attach` are there, and their version."""
    fix = "apt-get install lxc"
    missing = [program for program in ("lxc-start", "lxc-stop", "lxc-attach") if shutil.which(program) is None]
    if missing:
        return Requirement("lxc", False, f"not found: {', '.join(missing)}", fix)
    answer = _run(["lxc-start", "--version"])
    if answer.returncode != 0:
        return Requirement("lxc", False, f"lxc-start --version: {answer.stderr.strip()}", fix)
    found = answer.stdout.strip()
    if _version(found) < _MIN_LXC:
        return Requirement("lxc", False, f"liblxc {found}", "install LXC 4.0 or later")
    return Requirement("lxc", True, f"liblxc {found}")


def python_binding() -> Requirement:
    """Check that Python finds the binding of liblxc, without loading liblxc into this process."""
    specs = [importlib.util.find_spec(module) for module in ("lxc", "_lxc")]
    if any(spec is None or spec.origin is None for spec in specs):
        fix = "apt-get install gcc pkg-config lxc-dev python3-dev, then pip install 'lxc-pool[server]'"
        return Requirement("python-lxc", False, f"{sys.executable} finds no module lxc", fix)
    return Requirement("python-lxc", True, str(specs[1] and specs[1].origin))


def static_busybox() -> Requirement:
    """Check that the busybox base image can be built."""
    try:
        return Requirement("busybox", True, f"{busybox.find()} is static")
    except ImageError as error:
        return Requirement("busybox", False, str(error), "apt-get install busybox-static")


def control_groups() -> Requirement:
    """Check that cgroups are mounted, and say in which layout."""
    trees = cgroups.hierarchies()
    found = cgroups.layout(trees)
    if found is cgroups.Layout.NONE:
        return Requirement("cgroups", False, "not mounted", "mount -t cgroup2 cgroup2 /sys/fs/cgroup")
    return Requirement("cgroups", True, f"{found}, {len(trees)} mounted")


def overlay(state_dir: Path) -> Requirement:
    """Check that an overlay can be mounted whose upper directory is on the file system of *state_dir*.

    It is tried in a mount namespace of a child's own, so that the mount can't outlive it.
    """
    if os.geteuid() != 0:
        return Requirement("overlay", False, "can't be tried without root", "run this check as root")
    place = _nearest(state_dir)
    try:
        with tempfile.TemporaryDirectory(prefix=".lxc-pool-check-", dir=place) as scratch:
            for name in ("lower", "upper", "work", "merged"):
                (Path(scratch) / name).mkdir()
            (Path(scratch) / "lower/old").touch()
            # Relative to the working directory: a comma or colon in the path would break the options.
            tried = _run(["unshare", "--mount", "--propagation", "private", "sh", "-c", _OVERLAY], cwd=scratch)
    except OSError as error:
        return Requirement("overlay", False, f"{place}: {error}", "use a state dir that root can write to")
    if tried.returncode != 0:
        reason = " ".join(tried.stderr.split())
        fix = "put the state dir (--state-dir) on ext4, xfs, btrfs or tmpfs, not on an overlay or NFS"
        if reason.startswith("unshare:"):
            fix = "allow mounting here: CAP_SYS_ADMIN, in Docker --privileged"
        elif not _knows_overlay():
            fix = "modprobe overlay, or use a kernel with CONFIG_OVERLAY_FS"
        return Requirement("overlay", False, f"no overlay with its upper directory in {place}: {reason}", fix)
    return Requirement("overlay", True, f"works in {place}")


def upper_layers(state_dir: Path) -> Requirement:
    """Say what bounds what containers write to their disks; either will do."""
    kind, why = layers.bound(_nearest(state_dir / "containers"))
    return Requirement("upper layers", True, f"bounded by {kind}: {why}")


def user_namespaces() -> Requirement:
    """Check that unprivileged containers are possible."""
    limit = _number("/proc/sys/user/max_user_namespaces")
    if not os.path.exists("/proc/self/ns/user") or limit is None:
        return Requirement("user namespaces", False, "not in this kernel", "use a kernel with CONFIG_USER_NS=y")
    if limit == 0:
        return Requirement("user namespaces", False, "none allowed", "sysctl user.max_user_namespaces=15000")
    return Requirement("user namespaces", True, f"up to {limit}")


def descriptors() -> Requirement:
    """Check how many files this process may open at most."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < _MIN_DESCRIPTORS:
        fix = "raise the hard limit: ulimit -Hn 65536, or LimitNOFILE=65536 in the service's unit"
        return Requirement("descriptors", False, f"hard limit {hard}", fix)
    return Requirement("descriptors", True, f"hard limit {'none' if hard == resource.RLIM_INFINITY else hard}")


def inotify() -> Requirement:
    """Check that containers together may watch enough files."""
    limit = _number("/proc/sys/fs/inotify/max_user_instances")
    if limit is None:
        fix = "use a kernel with CONFIG_INOTIFY_USER=y"
        return Requirement("inotify", False, "not in this kernel", fix, advice=True)
    if limit < GOOD_INOTIFY:
        fix = f"sysctl fs.inotify.max_user_instances={GOOD_INOTIFY * 8}"
        return Requirement("inotify", False, f"{limit} instances for all containers", fix, advice=True)
    return Requirement("inotify", True, f"{limit} instances")


def changes_of_user() -> Requirement:
    """Check that a process which changes its user stays closed to others until it says otherwise.

    A command does on its way into a container. With 1 the kernel opens it, and it can close itself only after that.
    Source: fs.suid_dumpable in Linux Documentation/admin-guide/sysctl/fs.rst, which calls 1 insecure.
    """
    value = _number("/proc/sys/fs/suid_dumpable")
    if value == 1:
        fix = "sysctl fs.suid_dumpable=0"
        detail = "fs.suid_dumpable is 1: for a moment, a container can trace a command that is about to enter it"
        return Requirement("suid_dumpable", False, detail, fix, advice=True)
    return Requirement("suid_dumpable", True, "not in this kernel" if value is None else str(value))


def apparmor(sysfs: Path = Path("/sys")) -> Requirement:
    """Check that unprivileged containers run under our AppArmor profile, and privileged ones under liblxc's.

    Where AppArmor is on, and liblxc can't put on the profile that it is to, it starts nothing (measured, 5.0.2).

    Args:
        sysfs: Where sysfs is mounted.
    """
    if not profiles.is_on(sysfs):
        fix = "boot with apparmor=1 security=apparmor; without it, containers are kept in by all else alone"
        return Requirement("apparmor", False, "off, or not in this kernel", fix, advice=True)
    try:
        modes = profiles.modes(sysfs)
    except PermissionError:
        return Requirement("apparmor", False, "its profiles can't be seen without root", "run this check as root")
    except OSError as error:
        fix = f"mount -t securityfs securityfs {sysfs / 'kernel/security'}"
        return Requirement("apparmor", False, f"on, but {error.filename}: {error.strerror}", fix)
    ours = profiles.is_enforced(profiles.PROFILE, sysfs)
    if profiles.LIBLXC_PROFILE not in modes:
        missing = f"the profile {profiles.LIBLXC_PROFILE} is not loaded, without which no %scontainer starts"
        fix = "apparmor_parser -r /etc/apparmor.d/lxc-containers (of the package lxc; Debian: apt-get install apparmor)"
        return Requirement("apparmor", False, f"on, but {missing % ('privileged ' if ours else '')}", fix, advice=ours)
    for name, otherwise in (
        (profiles.LIBLXC_PROFILE, "it forbids containers nothing"),
        (profiles.PROFILE, f"{profiles.LIBLXC_PROFILE} is used in its place"),
    ):
        if name in modes and not profiles.is_enforced(name, sysfs):
            detail = f"the profile {name} is in mode {modes[name]}"
            return Requirement("apparmor", False, detail, f"aa-enforce {name}; until then {otherwise}", advice=True)
    if not ours:
        detail = (
            f"the profile {profiles.PROFILE} is not loaded: {profiles.LIBLXC_PROFILE} is used in its place, "
            "in which systemd can't make its mounts"
        )
        return Requirement("apparmor", False, detail, "lxc-pool setup", advice=True)
    return Requirement("apparmor", True, f"{profiles.PROFILE} is enforced; {profiles.LIBLXC_PROFILE} if privileged")


def bridge_network(config: NetworkConfig, instance: str) -> Requirement:
    """Check that the network can be made that profiles want; see `bridge.plan`."""
    packages = {"ip": "iproute2", "nft": "nftables"}
    if missing := [program for program in packages if shutil.which(program) is None]:
        fix = f"apt-get install {' '.join(packages[program] for program in missing)}"
        return Requirement("bridge", False, f"not found: {', '.join(missing)}", fix)
    if os.geteuid() != 0:
        return Requirement("bridge", False, "can't be tried without root", "run this check as root")
    try:
        plan = bridge.plan(config, instance)
        firewall.rehearse(dataclasses.replace(plan, subnet=next(plan.subnet.subnets(new_prefix=29))))
    except ConfigError as error:
        return Requirement("bridge", False, "not as it is configured", str(error))
    except BackendError as error:
        fix = "use a kernel with bridges and nftables (CONFIG_BRIDGE, CONFIG_NF_TABLES_BRIDGE, CONFIG_NFT_CONNLIMIT, …)"
        if isinstance(error.__cause__, subprocess.TimeoutExpired):  # which says nothing of what the kernel has
            fix = (
                "check again when the host is less busy; if it stays so, see what holds the kernel's rules or devices: "
                "`ps -C nft,iptables,ip,modprobe -o pid,stat,wchan:20,etime,args`"
            )
        return Requirement("bridge", False, str(error), fix)
    return Requirement("bridge", True, f"{plan.bridge}, {plan.subnet}, resolvers {', '.join(plan.resolvers) or 'none'}")


def _run(command: list[str], cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run *command*; one that can't run, or takes too long, is one that failed."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _nearest(directory: Path) -> Path:
    """Return a directory, or the lowest one above it that is there."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())


def _knows_overlay() -> bool:
    """Tell whether the kernel has overlay; trying to mount one has loaded the module if there is one."""
    return any(line.split()[-1:] == ["overlay"] for line in Path("/proc/filesystems").read_text("ascii").splitlines())


def _version(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None

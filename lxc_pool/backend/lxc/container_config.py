"""Write a container's liblxc configuration by hand: ten times as fast as the API's clone, and nothing inherited.

Source: lxc.container.conf(5) of liblxc 5.0; Incus's defaults for unprivileged containers (doc/security.md there).
"""

from __future__ import annotations

import re
from ipaddress import IPv4Interface
from pathlib import Path

from lxc_pool.backend.lxc import console, limits, rootfs
from lxc_pool.backend.protocol import Blueprint, Endpoint
from lxc_pool.host import idranges

_DROPPED_CAPABILITIES = "mac_admin mac_override sys_module sys_rawio sys_time"
"""Of privileged containers; what Debian's common.conf drops too: none of it is confined to a namespace."""

_SHARES = {
    "max_inotify_instances": 32,
    "max_fanotify_groups": 32,
    **{f"max_{kind}_namespaces": 128 for kind in ("user", "pid", "mnt", "net", "uts", "ipc", "cgroup", "time")},
}
"""What an unprivileged container may take of what the kernel counts against the host's root for all of them together:
one container took all 128 inotify instances, the host's own included (measured). Guesses: systemd takes under ten of
each. Source: Linux kernel/ucount.c, Documentation/admin-guide/sysctl/user.rst."""

_IPV6 = Path("/proc/sys/net/ipv6")
"""Not there on a kernel without it, where liblxc would fail to set what is below."""

_DEVICES = ("c 1:3", "c 1:5", "c 1:7", "c 1:8", "c 1:9", "c 5:0", "c 5:1", "c 5:2", "c 136:*")
"""null, zero, full, random, urandom, tty, console, ptmx, pts: what a privileged container may use."""


def render(blueprint: Blueprint, directory: Path, first_id: int | None, apparmor: str | None = None) -> str:
    """Return the configuration of one container.

    Debian's `common.conf` is not included: its reboot hook sleeps half a second in each stop (measured). There is no
    seccomp policy: whoever starts it has one on, see `host.seccomp`.

    Args:
        blueprint: What it is made of.
        directory: Where its files are.
        first_id: The first of its range of ids; None: it is privileged.
        apparmor: The AppArmor profile to run under; None: liblxc's own, if the host has AppArmor.
    """
    lines = [
        ("lxc.uts.name", blueprint.name),
        ("lxc.rootfs.path", f"dir:{rootfs.path(directory)}"),
        *_network(blueprint.endpoint),
        ("lxc.autodev", "1"),
        ("lxc.tty.max", "0"),
        ("lxc.pty.max", "1024"),
        *console.settings(directory),
        ("lxc.mount.entry", "tmpfs dev/shm tmpfs nosuid,nodev,create=dir,mode=1777 0 0"),
        ("lxc.log.file", str(directory / "lxc.log")),
        ("lxc.log.level", "ERROR"),
    ]
    if blueprint.profile.no_new_privs:
        lines.append(("lxc.no_new_privs", "1"))
    if apparmor is not None:
        lines.append(("lxc.apparmor.profile", apparmor))
    if first_id is None:
        lines += [
            ("lxc.mount.auto", "proc:mixed sys:mixed cgroup:mixed"),
            ("lxc.cap.drop", _DROPPED_CAPABILITIES),
        ]
        # Both families; liblxc ignores the one that the host does not have.
        for family in ("cgroup", "cgroup2"):
            lines.append((f"lxc.{family}.devices.deny", "a"))
            lines += [(f"lxc.{family}.devices.allow", f"{device} rwm") for device in _DEVICES]
    else:
        lines += [
            ("lxc.mount.auto", "proc:rw sys:rw cgroup:rw:force"),
            # With it, its root could raise those shares again; it is good for little else in a user namespace.
            ("lxc.cap.drop", "sys_resource"),
            *((f"lxc.sysctl.user.{name}", str(share)) for name, share in _SHARES.items()),
            ("lxc.idmap", f"u 0 {first_id} {idranges.SIZE}"),
            ("lxc.idmap", f"g 0 {first_id} {idranges.SIZE}"),
        ]
    return "".join(f"{key} = {value}\n" for key, value in [*lines, *_limits(blueprint)])


def port(directory: Path) -> str | None:
    """Return the name of a container's port on a bridge, read from its configuration; None if there is none."""
    return _find(directory, r"^lxc\.net\.0\.veth\.pair = (\S+)$")


def first_id(directory: Path) -> int | None:
    """Return the first id of a container's range, read from its configuration; None if there is none."""
    found = _find(directory, r"^lxc\.idmap = u 0 (\d+) ")
    return None if found is None else int(found)


def _find(directory: Path, pattern: str) -> str | None:
    try:
        text = (directory / "config").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else None


def _network(endpoint: Endpoint | None) -> list[tuple[str, str]]:
    """Everything is set by liblxc before init runs: there is nothing to wait for, and nothing for the image to do."""
    if endpoint is None:
        return [("lxc.net.0.type", "empty"), ("lxc.net.0.flags", "up")]
    lines = [
        ("lxc.net.0.type", "veth"),
        ("lxc.net.0.link", endpoint.bridge),
        ("lxc.net.0.veth.pair", endpoint.port),
        ("lxc.net.0.name", "eth0"),
        ("lxc.net.0.hwaddr", endpoint.mac),
        # With the broadcast address, which liblxc makes 0.0.3.255 of a /22 (measured).
        ("lxc.net.0.ipv4.address", f"{endpoint.address} {IPv4Interface(endpoint.address).network.broadcast_address}"),
        ("lxc.net.0.ipv4.gateway", endpoint.gateway),
        ("lxc.net.0.flags", "up"),
    ]
    if _IPV6.exists():
        # The bridge lets none of it through; so that nobody inside waits for it, either.
        lines += [(f"lxc.sysctl.net.ipv6.conf.{which}.disable_ipv6", "1") for which in ("all", "default")]
    return lines


def _limits(blueprint: Blueprint) -> list[tuple[str, str]]:
    """Both families of each limit; `limits.verify` reads back what is in force."""
    profile = blueprint.profile
    return [
        ("lxc.cgroup.pids.max", str(profile.pids)),
        ("lxc.cgroup2.pids.max", str(profile.pids)),
        ("lxc.cgroup.memory.limit_in_bytes", str(profile.memory)),
        ("lxc.cgroup2.memory.max", str(profile.memory)),
        ("lxc.cgroup.cpu.shares", str(limits.shares(profile.cpu))),
        ("lxc.cgroup2.cpu.weight", str(profile.cpu)),
    ]

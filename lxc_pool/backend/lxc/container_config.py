"""Write a container's liblxc configuration by hand: ten times as fast as the API's clone, and nothing inherited.

Source: lxc.container.conf(5) of liblxc 5.0.
"""

from __future__ import annotations

from pathlib import Path

from lxc_pool.backend.protocol import Blueprint

_DROPPED_CAPABILITIES = "mac_admin mac_override sys_module sys_rawio sys_time"
"""What Debian's common.conf drops too: none of it is confined to a namespace."""


def render(blueprint: Blueprint, directory: Path) -> str:
    """Return the configuration of the container whose files are in *directory*.

    Debian's `common.conf` is not included: its reboot hook sleeps half a second in each stop (measured).
    """
    lines = [
        ("lxc.uts.name", blueprint.name),
        ("lxc.rootfs.path", f"overlay:{blueprint.image.rootfs}:{directory / 'overlay' / 'delta'}"),
        ("lxc.net.0.type", blueprint.profile.network),
        ("lxc.net.0.flags", "up"),
        ("lxc.autodev", "1"),
        ("lxc.tty.max", "0"),
        ("lxc.pty.max", "1024"),
        ("lxc.console.path", "none"),
        ("lxc.mount.auto", "proc:mixed sys:mixed cgroup:mixed"),
        ("lxc.mount.entry", "tmpfs dev/shm tmpfs nosuid,nodev,create=dir,mode=1777 0 0"),
        ("lxc.cap.drop", _DROPPED_CAPABILITIES),
        ("lxc.log.file", str(directory / "lxc.log")),
        ("lxc.log.level", "ERROR"),
    ]
    return "".join(f"{key} = {value}\n" for key, value in lines)

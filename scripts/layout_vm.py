#!/usr/bin/env python3
r"""Run a command on a host with another cgroup layout: in a small virtual machine that has this host's root, read-only.

```
 this host ── qemu ── Linux from a package, not installed
   / ── 9p, read-only ──► lower layer ┐
                  tmpfs ► upper layer ┴ root: what is written there is gone with the machine
   a sparse file ── ext4 ► /var/tmp     TMPDIR: a base image has to be where mounts can be idmapped
   a directory ──── 9p ──► /mnt         results come back through it
```

The program of the machine's PID 1 is a shell; its working directory is this one's. For the recordings in
`tests/security/layouts`, and to try a change on a layout that one does not have:

    apt-get install --no-install-recommends qemu-system-x86 busybox-static e2fsprogs kmod
    apt-get download linux-image-6.1.0-56-amd64 && dpkg-deb -x linux-image-*.deb /tmp/kernel
    scripts/layout_vm.py --kernel /tmp/kernel v2 -- python -m pytest tests/security/test_inside.py

It is not part of CI. Source: Linux Documentation/filesystems/9p.rst, driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

CONTROLLERS = "cpu cpuacct cpuset memory devices freezer blkio pids net_cls net_prio perf_event hugetlb rdma misc"
"""Those of version 1. Source: Linux include/linux/cgroup_subsys.h."""

JOINED = CONTROLLERS.replace("cpu cpuacct", "cpu,cpuacct").replace("net_cls net_prio", "net_cls,net_prio")
"""As systemd mounts them. Source: systemd 252, src/shared/mount-setup.c, join_controllers."""

_V1 = """\
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
for them in {controllers} name=systemd; do
    directory=/sys/fs/cgroup/${{them#name=}}
    mkdir $directory
    case $them in name=*) options=none,$them;; *) options=$them;; esac
    mount -t cgroup -o $options cgroup $directory
done
echo 1 > /sys/fs/cgroup/cpuset/cgroup.clone_children
"""

LAYOUTS = {
    "v1": _V1.format(controllers=CONTROLLERS),
    "v1-joined": _V1.format(controllers=JOINED),
    "hybrid": _V1.format(controllers=JOINED)
    + "mkdir /sys/fs/cgroup/unified; mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup/unified\n",
    "v2": "mount -t cgroup2 -o nsdelegate,memory_recursiveprot cgroup2 /sys/fs/cgroup\n",
}
"""How each is mounted: every controller of its own; as systemd does with `systemd.unified_cgroup_hierarchy=0`; and
with version 2 beside them, without controllers; and version 2 alone."""

_PROCESSES = """\
for tree in /sys/fs/cgroup /sys/fs/cgroup/systemd /sys/fs/cgroup/unified; do
    [ -e $tree/cgroup.procs ] || continue
    mkdir -p $tree/init.scope $tree/system.slice/command.service
    echo 1 > $tree/init.scope/cgroup.procs
done
enter() {
    for tree in /sys/fs/cgroup /sys/fs/cgroup/systemd /sys/fs/cgroup/unified; do
        [ -e $tree/cgroup.procs ] && sh -c 'echo $PPID > $0/cgroup.procs' $tree/system.slice/command.service
    done
}
"""
"""Put the first process and the command where systemd has itself and its services."""

_MACHINE = "-accel tcg -cpu max -nodefaults -no-user-config -nographic -no-reboot -serial stdio"
"""Emulated: it boots in ten seconds all the same, and needs nothing of the machine it is on. It has no network."""

_MODULES = ("virtio_pci", "virtio_blk", "9pnet_virtio", "9p", "overlay", "crc32c_generic", "ext4")

_INIT = """\
#!/bin/busybox sh
set -e
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144,cache=loose host /lower
mount -t tmpfs -o mode=755 tmpfs /upper
mkdir /upper/delta /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/delta,workdir=/upper/work overlay /root
mkdir -p /root/run
cp /start /root/start
umount /dev /proc
exec switch_root /root /bin/sh /start
"""

_START = """\
export PATH={path}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=600,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/lock
mount -t ext4 /dev/vda /var/tmp
chmod 1777 /var/tmp
mount -t 9p -o trans=virtio,version=9p2000.L results /mnt
mkdir -p /lib/modules
mount --bind {kernel}/lib/modules /lib/modules
hostname layout-{layout}
ip link set lo up 2>/dev/null
{cgroups}
export TMPDIR=/var/tmp HOME=/root
cd {directory}
(enter; exec {command})
echo $? > /mnt/.status
sync
echo o > /proc/sysrq-trigger
while :; do :; done
"""


def main() -> int:
    """Boot, run, and return the command's exit status; 125 if it never came to its end."""
    parser = argparse.ArgumentParser(description="Run a command on another cgroup layout, in a virtual machine.")
    parser.add_argument("--kernel", type=Path, required=True, help="where a kernel package of Debian is unpacked")
    parser.add_argument("--results", type=Path, help="a directory that the machine has as /mnt, to write to")
    parser.add_argument("--memory", default="2G", help="of the machine, its tmpfs included (default: 2G)")
    parser.add_argument("layout", choices=sorted(LAYOUTS))
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    kernel = arguments.kernel.resolve()
    with tempfile.TemporaryDirectory(prefix="layout-vm.") as scratch:
        results = arguments.results or Path(scratch, "results")
        results.mkdir(exist_ok=True)
        disk, initramfs = Path(scratch, "disk"), Path(scratch, "initramfs")
        subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", disk, "4G"], check=True)
        start = _START.format(
            path=os.environ["PATH"],
            kernel=kernel,
            layout=arguments.layout,
            cgroups=LAYOUTS[arguments.layout] + _PROCESSES,
            directory=shlex.quote(os.getcwd()),
            command=shlex.join(arguments.command),
        )
        initramfs.write_bytes(gzip.compress(_initramfs(kernel, start), 1))
        subprocess.run(
            [
                *("nice", "qemu-system-x86_64", *_MACHINE.split(), "-m", arguments.memory),
                *("-kernel", next((kernel / "boot").glob("vmlinuz-*")), "-initrd", initramfs),
                *("-append", "console=ttyS0 quiet panic=-1 apparmor=0"),
                *("-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"),
                *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
                *("-virtfs", f"local,path={results},mount_tag=results,security_model=none"),
            ],
            stdin=subprocess.DEVNULL,
            check=True,
        )
        status = results / ".status"
        if not status.exists():
            return 125
        code = int(status.read_text())
        status.unlink()
        return code


def _initramfs(kernel: Path, start: str) -> bytes:
    """Return a cpio archive with busybox, the modules that lead to the root, and what is to be run."""
    (release,) = (kernel / "lib/modules").iterdir()
    subprocess.run(["/sbin/depmod", "-b", str(kernel), release.name], check=True)
    modules = list(_in_order(release, _MODULES))
    archive = bytearray()
    for directory in ("bin", "proc", "dev", "lower", "upper", "root", "modules"):
        archive += _entry(directory, 0o040755, b"")
    archive += _entry("bin/busybox", 0o100755, Path("/bin/busybox").read_bytes())
    archive += _entry("init", 0o100755, _INIT.encode())
    archive += _entry("start", 0o100755, start.encode())
    archive += _entry("modules/order", 0o100644, "\n".join(path.name for path in modules).encode())
    for path in modules:
        archive += _entry(f"modules/{path.name}", 0o100644, path.read_bytes())
    return bytes(archive + _entry("TRAILER!!!", 0, b""))


def _in_order(release: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files of the modules *names*, each after those that it needs; one that is built in is none."""
    needs: dict[str, list[str]] = {}
    for line in (release / "modules.dep").read_text(encoding="ascii").splitlines():
        file, _, those = line.partition(":")
        needs[file] = those.split()
    seen: set[str] = set()
    for name in names:
        wanted = [file for file in needs if Path(file).name.partition(".")[0].replace("-", "_") == name]
        for file in [*reversed(needs[wanted[0]]), wanted[0]] if wanted else ():
            if file not in seen:
                seen.add(file)
                yield release / file


def _entry(name: str, mode: int, content: bytes) -> bytes:
    """Return one file of a cpio archive in the kernel's format, newc."""
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    return header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4)


if __name__ == "__main__":
    sys.exit(main())

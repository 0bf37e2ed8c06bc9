"""What systemd is told of the service: its unit, and that it is ready."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

UNIT = "lxc-pool.service"

_RUNNING = Path("/run/systemd/system")
"""There if systemd is this machine's init. Source: sd_booted(3)."""

_TIMEOUT = 30.0
"""Seconds that systemctl may take. A guess."""

_UNIT = """\
{mark}
# Changes belong in a drop-in (`systemctl edit {name}`).
[Unit]
Description=Keeps LXC containers started, for tests
After=local-fs.target network.target
# They may drop what is forwarded, or flush what is not theirs: the bridge's rules come after.
After=docker.service firewalld.service nftables.service
RequiresMountsFor={state_dir}

[Service]
Type=notify
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
# It ends its containers and all its processes itself. If it is killed, commands go on, and the next one adopts them.
KillMode=process
TimeoutStopSec=120
TimeoutStartSec=60
Delegate=yes
LimitNOFILE=1048576
TasksMax=infinity

[Install]
WantedBy=multi-user.target
"""


def unit(command: Sequence[str], state_dir: Path, mark: str) -> str:
    """Return the unit that runs *command*; *mark* is its first line.

    `KillMode=process`: systemd's own way, and `mixed`, would kill running commands after the service was killed.
    """
    return _UNIT.format(
        mark=mark,
        name=UNIT.removesuffix(".service"),
        command=" ".join((_quoted(command[0]), *(_quoted(word).replace("$", "$$") for word in command[1:]))),
        state_dir=_quoted(str(state_dir)),
    )


def is_init() -> bool:
    """Return whether systemd runs this machine."""
    return _RUNNING.is_dir()


def systemctl(*arguments: str) -> str | None:
    """Ask systemd for something; return what went wrong, None if nothing."""
    try:
        done = subprocess.run(
            ["systemctl", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"systemctl {' '.join(arguments)}: {error}"
    return None if done.returncode == 0 else f"systemctl {' '.join(arguments)}: {done.stderr.strip()}"


def take_notify_socket() -> str:
    """Return where systemd waits to hear that the service is ready, empty if it does not.

    It is taken out of the environment: whatever this process starts is not what systemd waits for.
    """
    return os.environ.pop("NOTIFY_SOCKET", "")


def notify_ready(address: str) -> None:
    """Tell systemd, at what `take_notify_socket` returned, that the service accepts connections.

    Source: sd_notify(3), "Notes".
    """
    if address[:1] not in ("/", "@"):
        return
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        contextlib.suppress(OSError),  # nobody waits for it any more
    ):
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
        sock.sendall(b"READY=1")


def _quoted(word: str) -> str:
    """Quote a word as systemd reads it; in an argument, but not in the program, a `$` has to be doubled, too.

    Source: systemd.service(5), "Command lines"; systemd.unit(5), "Specifiers".
    """
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if not escaped or any(character in escaped for character in " \t'\"\\;") else escaped

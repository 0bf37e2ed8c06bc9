"""A Debian container as the tests of this suite see it: a server that the package tally is, or is not, installed on."""

from __future__ import annotations

from pathlib import Path

from machine import Machine

TALLY = Path(__file__).parent / "tally"
"""The package, as dpkg-deb takes it."""


class Server(Machine):
    """One container, for one test."""

    def package(self, version: str, conf: str | None = None) -> str:
        """Build a release of the package on the server; return its path.

        Args:
            version: What it calls itself.
            conf: Its default configuration; None: the source's.
        """
        self.container.push(TALLY, f"/root/{version}")
        self.sh(f"sed -i 's/^Version: .*/Version: {version}/' /root/{version}/DEBIAN/control")
        if conf is not None:
            self.sh(f"echo '{conf}' >/root/{version}/etc/tally.conf")
        self.sh(f"dpkg-deb --root-owner-group --build /root/{version} /root/{version}.deb && rm -r /root/{version}")
        return f"/root/{version}.deb"

    def dpkg(self, arguments: str) -> None:
        """Let dpkg do something; a configuration file that the administrator has changed is kept."""
        self.sh(f"DEBIAN_FRONTEND=noninteractive dpkg --force-confold {arguments}")

    def visit(self, port: int = 7070) -> int:
        """Visit the service; return the count."""
        return int(self.sh(f"bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port} && cat <&3'"))

    def state(self) -> str:
        """Ask systemd what the service is doing."""
        return self.try_sh("systemctl is-active tally").stdout.strip()

    def main_pid(self) -> int:
        """Ask systemd for the daemon's pid; 0: there is none."""
        return int(self.sh("systemctl show --property=MainPID --value tally"))

#!/usr/bin/env python3
"""The administrator's cleanup, for a shell or for cron: a thin caller of `lxc-pool cleanup`.

    lxc_pool_admin.py cleanup [--execute] [--older-than S] [--log FILE] [--host-dir DIR] [--state-dir DIR] [--all]

In cron, once an hour, as root:

    17 * * * * /opt/lxc-pool/.venv/bin/python /opt/lxc-pool/scripts/lxc_pool_admin.py cleanup --execute \
        --older-than 3600 --log /var/log/lxc-pool-cleanup.log

Exit status: 0 clean, or all was removed; 1 there is residue (without --execute); 2 wrong use, or the ledger can't be
read: nothing was removed; 5 something could not be removed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
from collections.abc import Sequence

from lxc_pool.cli.main import main as lxc_pool


def main(arguments: Sequence[str]) -> int:
    """Run the cleanup; with `--log FILE`, append what it says to that file with the time before it."""
    if not arguments or arguments[0] != "cleanup":
        print(__doc__, file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(prog="lxc_pool_admin.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--log", metavar="FILE")
    ours, words = parser.parse_known_args(arguments)
    if ours.log is None:
        return lxc_pool(words)
    try:
        log = open(ours.log, "a", encoding="utf-8")  # noqa: SIM115  # closed below: only its opening is tried here
    except OSError as error:
        print(f"{parser.prog}: can't write to --log {ours.log}: {error.strerror}; nothing was done", file=sys.stderr)
        return 2
    with log:
        now = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
        print(f"{now} {' '.join(words)}", file=log, flush=True)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                status = lxc_pool(words)
            except SystemExit as error:  # wrong use
                status = int(error.code or 0)
        print(f"{now} exit status {status}", file=log)
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

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
    words = list(arguments)
    if "--log" not in words:
        return lxc_pool(words)
    place = words.index("--log")
    if place + 1 >= len(words):
        print("--log needs a file", file=sys.stderr)
        return 2
    with open(words[place + 1], "a", encoding="utf-8") as log:
        del words[place : place + 2]
        now = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
        print(f"{now} {' '.join(words)}", file=log, flush=True)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            status = lxc_pool(words)
        print(f"{now} exit status {status}", file=log)
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

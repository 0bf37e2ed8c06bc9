"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from lxc_pool.config import DEFAULT_STATE_DIR


def add_state_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--state-dir`."""
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=DEFAULT_STATE_DIR,
        metavar="DIR",
        help=f"where containers, images and the ledger are (default: {DEFAULT_STATE_DIR})",
    )

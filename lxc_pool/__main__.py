"""`python -m lxc_pool` is `lxc-pool`."""

from lxc_pool.cli.main import main

raise SystemExit(main())

"""lxc_pool beside its peers: `python -m benchmarks.compare`, from the project's root, as root.

```
 __main__ ─► measure ─► peers/NAME      each peer that is installed: its daemon, its image, its commands
                │          └─ place     a peer's own directory, daemons, cgroups, and the end of them all
                ├─► session             one pytest session, a process of its own: suite/ run against one peer
                └─► plot                the picture
```

The suite has one test, so many times over: in a fresh system it runs one command and pushes one file. With lxc_pool the
system is the pytest plugin's `lxc_container`; with a peer it is what the peer's own command line makes, and removes.

Every system is the same: Debian's busybox, from the very root file system of the pool's image, `/sbin/init` as process
1, no network. The peers' containers are privileged, which is faster for each of them; the pool's are not.

What counts as a test's time is what pytest itself measures: setup, call and teardown. The first test of each worker
does not count: it connects to the pool, and finds programs that nobody has read from the disk yet. So neither does
the session's start, nor the warming of the pool, which is full and at rest before each session.

A round has one session of each peer with one worker (`-n 1`), and one with two; every other round goes in reverse
order.
"""

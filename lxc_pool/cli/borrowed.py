"""Change our terminal for a while, and leave it as it was on every way out that a process can see."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

_FATAL = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)


@contextlib.contextmanager
def borrowed(
    change: Callable[[], None], restore: Callable[[], None], on: Mapping[signal.Signals, Callable[[], None]]
) -> Iterator[int]:
    """Have our terminal changed for as long as the block lasts. For the main thread, where signals are handled.

    Yields a descriptor that can be read when a signal has come, to be waited for together with everything else: Python
    calls a handler between two of its own steps, so that one that comes just before a wait would be kept waiting, too.
    See `drain`.

    SIGINT is Python's as ever: it leaves the block by KeyboardInterrupt. What ends or stops the process otherwise does
    so with the terminal as it was; when a stopped process goes on, it is changed again.

    Args:
        change: Changes it; called again after a stop.
        restore: Makes it as it was; called more than once, and raises nothing.
        on: What else to do, on which signals.
    """

    def again(_number: int, _frame: FrameType | None) -> None:
        change()

    def do(number: int, _frame: FrameType | None) -> None:
        on[signal.Signals(number)]()

    def step_aside(number: int, _frame: FrameType | None) -> None:
        """Do what the signal does without a handler, with the terminal as it was; go on if it has not ended us."""
        restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, step_aside)
        change()

    handlers = dict.fromkeys((*_FATAL, signal.SIGTSTP), step_aside) | {signal.SIGCONT: again} | dict.fromkeys(on, do)
    # what is ignored stays so: nohup(1)
    before = {number: old for number in handlers if (old := signal.getsignal(number)) is not signal.SIG_IGN}
    woken, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    waker_before = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    try:
        for number in before:
            signal.signal(number, handlers[number])
        change()
        yield woken
    finally:
        restore()
        for number, old in before.items():
            signal.signal(number, old)
        signal.set_wakeup_fd(waker_before)
        os.close(woken)
        os.close(waker)


def drain(woken: int) -> None:
    """Read what says that signals have come; their handlers have been called then."""
    with contextlib.suppress(BlockingIOError):
        os.read(woken, 4096)

"""Ctrl-C and SIGTERM end a run after its current step, so that it can save first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self.is_requested = False

    def request(self, number: int, _: FrameType | None) -> None:
        """Ask once; a second Ctrl-C stops at once."""
        if self.is_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_requested = True


def leave_signals_to_parent(_: int) -> None:
    """Let a data loader's process ignore what ends the run; the run ends it when it is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def catch_signals() -> Iterator[Interruption]:
    """Turn the signals into requests while the context is open.

    Yields:
        The request; outside the main thread, where signals cannot be caught, it is never made.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption.request) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

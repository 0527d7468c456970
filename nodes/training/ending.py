"""Saves runs before the server exits, whichever signal ends it."""

import atexit
import signal
import threading
from collections.abc import Callable
from typing import Any

ENDING_SIGNALS = ("SIGTERM", "SIGHUP", "SIGBREAK")  # a container or service stops, a terminal or window closes


def before_the_end(shutdown: Callable[[], None]) -> None:
    atexit.register(shutdown)
    if threading.current_thread() is threading.main_thread():  # other threads may not set signal handlers
        for name in ENDING_SIGNALS:
            save_first(name, shutdown)


def save_first(name: str, shutdown: Callable[[], None]) -> None:
    """Call `shutdown` before a signal's earlier handler. A second signal does not wait for it."""
    number = getattr(signal, name, None)
    before = number and signal.getsignal(number)
    if before in (None, signal.SIG_IGN):  # not on this system, not set from Python, or ignored
        return

    def end(*arguments: Any) -> None:
        signal.signal(number, before)
        shutdown()
        if callable(before):
            before(*arguments)
        else:
            signal.raise_signal(number)

    signal.signal(number, end)

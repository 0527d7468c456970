"""What is done before the server ends, however it is told to."""

import atexit
import signal
import threading
from collections.abc import Callable
from typing import Any

ENDING_SIGNALS = ("SIGTERM", "SIGHUP", "SIGBREAK")  # a container or service stops, its terminal or window closes


def before_the_end(shutdown: Callable[[], None]) -> None:
    atexit.register(shutdown)
    if threading.current_thread() is threading.main_thread():  # no other may
        for name in ENDING_SIGNALS:
            save_first(name, shutdown)


def save_first(name: str, shutdown: Callable[[], None]) -> None:
    """Let what this signal did until now wait for `shutdown`. A second signal does not wait."""
    number = getattr(signal, name, None)
    before = number and signal.getsignal(number)
    if before in (None, signal.SIG_IGN):  # not of this system, or of another program's making, or ignored
        return

    def end(*arguments: Any) -> None:
        signal.signal(number, before)
        shutdown()
        if callable(before):
            before(*arguments)
        else:
            signal.raise_signal(number)

    signal.signal(number, end)

"""The log of one run: the log records of its thread, in a file of limited size."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT = 1 << 19  # most bytes of log.txt; log.txt.1 holds the ones before
LONGEST = 20_000  # most characters of one record; the end is kept, because it names the error


class RunLog(logging.Handler):
    """Appends the creating thread's log records, tracebacks included, to a file that is open only during a write."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.thread = path, threading.get_ident()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread == self.thread and bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.path.is_file() and self.path.stat().st_size > LIMIT:
                os.replace(self.path, earlier(self.path))
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(self.format(record)[-LONGEST:] + "\n")
        except Exception:  # a run does not fail because its log cannot be written
            self.handleError(record)


def earlier(path: Path) -> Path:
    return path.with_name(path.name + ".1")


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Write this thread's log records to the file `path` inside the `with` block."""
    handler = RunLog(path)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log, or [] if there is none."""
    kept = [p.read_text(encoding="utf-8", errors="replace") for p in (earlier(path), path) if p.is_file()]
    return "".join(kept).splitlines()[-count:]

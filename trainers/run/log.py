"""The log of one run: what its thread logs, in a file of bounded size."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT = 1 << 19  # bytes of log.txt; what was before that is in log.txt.1
LONGEST = 20_000  # characters of one record; of a longer one the end is kept, which names the error


class RunLog(logging.Handler):
    """Adds what the thread that made it logs, tracebacks included, to a file. It is open only while written to."""

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
        except Exception:  # as in every handler: a log is not worth a run
            self.handleError(record)


def earlier(path: Path) -> Path:
    return path.with_name(path.name + ".1")


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Keep what this thread logs meanwhile."""
    handler = RunLog(path)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log; nothing if there is none."""
    kept = [p.read_text(encoding="utf-8", errors="replace") for p in (earlier(path), path) if p.is_file()]
    return "".join(kept).splitlines()[-count:]

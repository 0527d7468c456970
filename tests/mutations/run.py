"""Makes one-line changes in a copy of the repository, one at a time, and shows which of them no test notices.

    python tests/mutations/run.py [WORD ...]

Tries the changes of `changes.py` whose id or file contains a WORD, or all of them. COMFYUI_DIR is as for the tests.
ComfyUI is imported once; the tests of each change run in a fork of this process. Exit status 1 if a change survives.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

import pytest
from changes import CHANGES, Change, misplaced

ROOT = Path(__file__).resolve().parents[2]
SLOW_IMPORTS = (
    *("server", "execution", "nodes", "comfy.sd", "comfy_api.latest", "comfy_extras.nodes_video_model"),
    *("av", "cv2", "peft", "pytorch_optimizer", "diffusers.optimization", "diffusers.training_utils"),
)
PATIENCE = 300  # seconds for the tests of one change
VERDICTS = {0: "SURVIVED", 1: "killed"}  # by pytest's exit status; others are errors in the list or a hang


def copy_repository(target: Path) -> None:
    """Copy the files that git tracks, and new ones that it does not ignore."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


class Workshop:
    """A copy of the repository, and this process with ComfyUI imported, of which tests run in forks."""

    def __init__(self, folder: Path) -> None:
        self.copy, self.base, self.scratch, self.log = (folder / name for name in ("copy", "base", "scratch", "log"))
        copy_repository(self.copy)
        os.environ.setdefault("COMFYUI_DIR", str(ROOT / ".runtime" / "ComfyUI"))
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.scratch)
        # Cached bytecode would hide a change of the same length in the same second.
        os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
        sys.path.insert(0, str(self.copy / "scripts"))
        self._make_base = importlib.import_module("comfy_client").make_base
        self._empty()
        importlib.import_module("comfy_library").start_comfyui(self.base)
        for name in SLOW_IMPORTS:
            importlib.import_module(name)

    def _empty(self) -> None:
        """Make the folders of ComfyUI and of temporary files anew, so that no file of an earlier change is found."""
        for folder in (self.base, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)
        self.scratch.mkdir()
        self._make_base(self.base, self.copy)

    def test(self, *arguments: str) -> int:
        """The exit status of pytest, or -1 if it takes too long. Its output is in `log`."""
        self._empty()
        if not (child := os.fork()):
            self._run(arguments)
        ended, deadline = (0, 0), time.monotonic() + PATIENCE
        try:
            while not ended[0] and time.monotonic() < deadline:
                time.sleep(0.05)
                ended = os.waitpid(child, os.WNOHANG)
        finally:
            if not ended[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(ended[1]) if ended[0] else -1

    def _run(self, arguments: tuple[str, ...]) -> None:
        status = 3
        try:
            os.chdir(self.copy)
            with self.log.open("wb") as log:
                for stream in (1, 2):
                    os.dup2(log.fileno(), stream)
            status = pytest.main(["-q", "-p", "no:cacheprovider", f"--basetemp={self.scratch / 'pytest'}", *arguments])
            sys.stdout.flush()
        finally:
            os._exit(status)

    def try_out(self, change: Change) -> int:
        """The exit status of pytest for the tests of a change, with it made."""
        file = self.copy / change.file
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(change.old, change.new), encoding="utf-8")
        try:
            return self.test("-x", *change.selection)
        finally:
            file.write_text(text, encoding="utf-8")


def main(words: list[str]) -> int:
    changes = [change for change in CHANGES if not words or any(w in f"{change.id} {change.file}" for w in words)]
    if wrong := misplaced(changes, ROOT):
        print(*wrong, sep="\n")
        return 1
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        workshop, began, survived = Workshop(Path(folder)), time.monotonic(), []
        selected = sorted({test for change in changes for test in change.selection})
        for tier, tests in groupby(selected, key=lambda test: test.startswith("tests/pure/")):
            if workshop.test(*tests):  # pure tests go alone
                print(f"Tests fail without a change{' (pure)' if tier else ''}:", workshop.log.read_text(), sep="\n")
                return 1
        print(f"{len(selected)} tests pass without a change, in {time.monotonic() - began:.0f} s", flush=True)
        for change in changes:
            at = time.monotonic()
            status = workshop.try_out(change)
            verdict = VERDICTS.get(status, f"ERROR {status}")
            print(f"{verdict:9} {time.monotonic() - at:5.1f} s  {change.id}  ({change.file})", flush=True)
            if status != 1:
                survived.append(change.id)
            if status not in VERDICTS:
                print(workshop.log.read_text(errors="replace")[-4000:])
        print(f"{len(changes) - len(survived)} of {len(changes)} killed in {time.monotonic() - began:.0f} s")
    print(*(f"survived: {name}" for name in survived), sep="\n", end="\n" if survived else "")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

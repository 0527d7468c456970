"""Checks of training on a GPU, the riskiest first: python tests/gpu/check.py [--out FOLDER] [--only NAME ...]

Needs ComfyUI's Python files ($COMFYUI_DIR) and the pack's requirements, no server and no network: bundle.sh gathers them.
Every check runs in a process of its own, with a limit of time, and leaves <name>.json in the folder; after the last one
check.json and check.md hold all of them. `--device cpu` runs the same checks on tiny models. Exit status 1 if one failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "benchmarks"), str(HERE.parents[1] / "scripts")]

SECONDS = {  # a limit for each, in the order in which they run; about eight minutes together on an H100
    "environment": 90,  # the first import of torch, from a cold disk
    "kernels": 60,
    "losses": 240,
    "jobs": 90,
    "memory": 150,
    "out_of_memory": 90,
    "times": 180,
    "times_14b": 180,
}


def run_alone(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The result of one check, made in a process of its own."""
    command = [sys.executable, __file__, "--run", name, "--device", options.device]
    command += ["--models", options.models, "--out", str(options.out)]
    path, began = options.out / f"{name}.json", time.perf_counter()
    path.unlink(missing_ok=True)
    with open(options.out / f"{name}.log", "w") as log:
        try:
            subprocess.run(command, stdout=log, stderr=log, timeout=options.patience * SECONDS[name])
            failure = "ended without a result"
        except subprocess.TimeoutExpired:
            failure = f"not done after {options.patience * SECONDS[name]:.0f} s"
    result = json.loads(path.read_text()) if path.is_file() else {"passed": False, "failure": failure}
    return {"check": name, "seconds": round(time.perf_counter() - began, 1), **result}


def run(name: str, device: str, models: Path, out: Path) -> None:
    """One check in this process."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from checks import CHECKS
    from models import Bench

    failure, rows = "", []
    with tempfile.TemporaryDirectory(prefix="kinoloom-gpu-") as folder:
        try:
            bench = Bench(Path(folder), models, device)
            rows = bench.rows
            CHECKS[name](bench)
        except Exception as error:  # the process boundary: the other checks go on
            traceback.print_exc()
            failure = f"{type(error).__name__}: {error}"
    if wrong := sum(not row.get("ok", True) for row in rows):
        failure = f"{failure} {wrong} of {len(rows)} results are not ok".strip()
    result = {"passed": not failure, "failure": failure, "rows": rows}
    (out / f"{name}.json").write_text(json.dumps(result, indent=1))


def markdown(results: list[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        verdict = "passed" if result["passed"] else f"FAILED: {result['failure']}"
        lines.append(f"## {result['check']}: {verdict} ({result['seconds']} s)\n")
        rows = result.get("rows", [])
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if rows:
            lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(str(row.get(name, '')) for name in columns)} |" for row in rows]
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--only", nargs="*", choices=tuple(SECONDS), default=tuple(SECONDS))
    parser.add_argument("--patience", type=float, default=1.0, help="times the limit of every check")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=tuple(SECONDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.run:
        run(options.run, options.device, options.models, options.out)
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="kinoloom-gpu-") as models:
        options.models = models
        for name in options.only:
            results.append(run_alone(name, options))
            (options.out / "check.json").write_text(json.dumps(results, indent=1))
            (options.out / "check.md").write_text(markdown(results))
            print(markdown(results[-1:]), flush=True)
    sys.exit(any(not result["passed"] for result in results))


if __name__ == "__main__":
    main()

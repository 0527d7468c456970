"""Raises on import if a required package is missing that is otherwise imported only when a run starts."""

from importlib.util import find_spec

FOR_RUNS = ("diffusers", "peft", "pytorch_optimizer")


def require_packages() -> None:
    if missing := [name for name in FOR_RUNS if find_spec(name) is None]:
        raise ImportError(
            f"Kinoloom needs {', '.join(missing)}, not found in this Python: run pip install -r requirements.txt in "
            "the pack's folder."
        )


require_packages()

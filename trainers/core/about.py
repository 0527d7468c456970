"""What pyproject.toml says about this pack."""

import re
from functools import cache
from pathlib import Path


@cache
def project(key: str) -> str:
    """The value of `version`, `Repository`, ... (tomllib is newer than the oldest Python that is supported)."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf'^{key} = "(.+)"$', text, re.MULTILINE)
    assert found, f"pyproject.toml has no {key}"
    return found[1]

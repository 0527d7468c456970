"""Reads a folder's captions from metadata.jsonl or metadata.csv, the format of other trainers and Hugging Face."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLES = ("metadata.jsonl", "metadata.csv")
FILE, TEXT = ("file_name", "video"), ("text", "prompt")


def read_metadata(folder: Path) -> dict[str, str]:
    """Captions by file name; {} if there is no such file. ValueError names the line that cannot be used."""
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"the folder holds both {' and '.join(TABLES)}: keep one")
    captions: dict[str, str] = {}
    for path in found:
        for number, row in _rows(path):
            name, text = _value(row, FILE), _value(row, TEXT)
            if name is None or text is None:
                raise ValueError(f"{path.name}, line {number}: expected {' or '.join(FILE)}, and {' or '.join(TEXT)}")
            name = name.replace("\\", "/").removeprefix("./")
            if captions.setdefault(name, text.strip()) != text.strip():
                raise ValueError(f"{path.name}, line {number}: has another caption for {name} than an earlier line")
    return captions


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            if path.suffix == ".csv":
                reader = csv.DictReader(lines, strict=True)
                for row in reader:
                    number = reader.line_num
                    yield number, row
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    yield number, row if isinstance(row, dict) else {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text") from error
    except (json.JSONDecodeError, csv.Error, RecursionError) as error:
        raise ValueError(f"{path.name}, line {number}: {error}") from error


def _value(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((row[name] for name in names if isinstance(row.get(name), str)), None)

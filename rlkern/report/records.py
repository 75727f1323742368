"""The files of a run's folder."""

import json
from pathlib import Path
from typing import Any


class ReportError(ValueError):
    """A folder that holds no run, or a viewer that is not installed."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL log; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text().split("\n") if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def read_settings(folder: Path) -> dict[str, Any]:
    """{section.key: value}, as on the command line."""
    path = folder / "config.json"
    try:
        sections = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error
    settings = {}
    for name, value in sections.items():
        inner = value if isinstance(value, dict) else {"": value}
        settings |= {f"{name}.{key}".rstrip("."): setting for key, setting in inner.items()}
    return settings

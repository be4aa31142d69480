"""Reads the log files of a service."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class LogFiles:
    """Holds all files of a log folder, rotated ones included."""

    def __init__(self, directory: Path) -> None:
        self._paths = sorted(path for path in directory.iterdir() if ".log" in path.name)

    @property
    def files(self) -> list[str]:
        """The names of their processes, such as `gateway-0`."""
        return sorted({path.name.partition(".")[0] for path in self._paths})

    @cached_property
    def text(self) -> str:
        return "".join(path.read_text(encoding="utf-8") for path in self._paths)

    @property
    def records(self) -> list[Record]:
        return [json.loads(line) for line in self.text.splitlines()]

    def of(self, request_id: str) -> list[Record]:
        return [record for record in self.records if record.get("request_id") == request_id]

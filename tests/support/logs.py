"""What a service has logged, read back from its files."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class LogFiles:
    """All files of a folder of logs, rotated ones too."""

    def __init__(self, directory: Path) -> None:
        self._paths = sorted(path for path in directory.iterdir() if ".log" in path.name)

    @property
    def files(self) -> list[str]:
        """Their processes: `gateway-0`."""
        return sorted({path.name.partition(".")[0] for path in self._paths})

    @cached_property
    def text(self) -> str:
        return "".join(path.read_text(encoding="utf-8") for path in self._paths)

    @property
    def records(self) -> list[Record]:
        return [json.loads(line) for line in self.text.splitlines()]

    def of(self, request_id: str) -> list[Record]:
        return [record for record in self.records if record.get("request_id") == request_id]

"""SHA-256 of files and of JSON values, by which data, recipes, weights and versions are identified."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Returns the hex SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_sha256(value: object) -> str:
    """Returns the hex SHA-256 of a JSON value in canonical form: keys sorted, no spaces, UTF-8.

    Raises:
        ValueError: the value holds NaN or an infinity, which JSON lacks.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()

"""The text that a base is measured on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import TextMissing, TextTooLarge

STDLIB_TEXT = "stdlib:pydoc_data.topics"
TEXT_BYTES_MAX = 16_000_000  # tokenized in one piece: about ten seconds and 4 million tokens


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """A text, its name in reports, and the SHA-256 of its UTF-8 bytes."""

    name: str
    content: str
    sha256: str


def load_eval_text(source: str) -> EvaluationText:
    """Loads `stdlib:pydoc_data.topics` or a UTF-8 file (a path, relative to the current directory).

    The first is the reference manual's help topics that CPython ships: half a megabyte of real technical
    English, in every environment, with nothing to download. Its bytes follow the Python version; the report
    records their hash. A file is named without its folders. Raises TextMissing or TextTooLarge.
    """
    if source == STDLIB_TEXT:
        return _named(source, _help_topics())
    path = Path(source)
    try:
        size_bytes = path.stat().st_size
        if size_bytes > TEXT_BYTES_MAX:
            raise TextTooLarge(source, size_bytes, TEXT_BYTES_MAX)
        return _named(path.name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TextMissing(source, str(error)) from None


def _help_topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _named(name: str, content: str) -> EvaluationText:
    return EvaluationText(name, content, hashlib.sha256(content.encode("utf-8")).hexdigest())

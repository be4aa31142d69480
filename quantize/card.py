"""The card of a base: its origin, shape, measurements, and the hash of every file of it.

`serve` reads cards with this module, so it imports neither torch nor transformers.
"""

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from math import exp
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantize.errors import CardInvalid, CardMissing, ChecksumMismatch, FilesUnexpected

CARD = "card.json"
REPORT = "report.md"
WEIGHTS = "model.safetensors"

# Excludes '/' and '@', which separate tenant, alias and version in names of adapters. No match is a path.
NAME_PATTERN = r"^[a-z0-9]+(?:[._-][a-z0-9]+)*$"
NAME_LENGTH_MAX = 64

BaseName = Annotated[str, Field(pattern=NAME_PATTERN, max_length=NAME_LENGTH_MAX)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(gt=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GateVerdict(_Frozen):
    """The rule of the gate, and the verdict on one quantized base."""

    rule: str
    passed: bool
    reason: str


class QuantizationReport(_Frozen):
    """Compares a quantized base with its parent: size, and loss on the same windows of the same text.

    Perplexities are exp(mean NLL in nats per token). The difference is after minus before, per token, with
    the 95% interval of a paired comparison over windows.
    """

    weights_bytes_before: Count
    weights_bytes_after: Count
    perplexity_before: float
    perplexity_after: float
    nll_difference: float
    nll_difference_ci95: tuple[float, float]
    tokens_scored: Count
    windows: Count
    window_tokens: Count
    text: str
    text_sha256: Sha256
    gate: GateVerdict

    @property
    def size_ratio(self) -> float:
        """Bytes of the quantized weights divided by bytes of the parent's."""
        return self.weights_bytes_after / self.weights_bytes_before

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity after divided by perplexity before: exp of the mean difference in NLL."""
        return exp(self.nll_difference)

    @property
    def perplexity_ratio_ci95(self) -> tuple[float, float]:
        """The 95% interval of `perplexity_ratio`."""
        low, high = self.nll_difference_ci95
        return exp(low), exp(high)


class EmbeddingFacts(_Frozen):
    """Says how a base makes one vector of a text: its length, and how it is made of the tokens' vectors.

    `normalized` vectors have the length 1 in space.
    """

    size: Count
    pooling: Literal["mean", "cls"]
    normalized: bool


class BaseCard(_Frozen):
    """One base model on disk, identified by the hashes of its files.

    A base with `embedding` makes vectors, and generates no text. `tool_parser` and `reasoning_parser` name
    vLLM's parsers for how the model writes tool calls and reasoning; None where it writes none.
    """

    schema_version: Literal[1] = 1
    name: BaseName
    source: str
    licence: str
    architecture: str
    parameters: Count
    vocab_size: Count
    hidden_size: Count
    layers: Count
    max_context_tokens: Count
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    embedding: EmbeddingFacts | None = None
    scheme: Literal["float32", "bfloat16", "bnb-nf4"]
    parent: BaseName | None = None
    parent_sha256: Sha256 | None = None
    recipe_sha256: Sha256
    weights_sha256: Sha256
    files_sha256: dict[str, Sha256]
    bytes_on_disk: Count
    report: QuantizationReport | None = None
    libraries: dict[str, str]
    created_at: AwareDatetime

    @model_validator(mode="after")
    def _lineage_is_whole(self) -> Self:
        lineage = (self.parent, self.parent_sha256, self.report)
        quantized = self.scheme not in ("float32", "bfloat16")
        if any((part is not None) != quantized for part in lineage):
            raise ValueError(
                "parent, parent_sha256 and report belong to every quantized base, and to no other"
            )
        return self


def read_card(directory: Path) -> BaseCard:
    """Reads a base's card, and none of its weights.

    Raises CardMissing or CardInvalid.
    """
    try:
        text = (directory / CARD).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise CardMissing(str(directory)) from None
    try:
        return BaseCard.model_validate_json(text)
    except ValidationError as error:
        raise CardInvalid(str(directory), problems_of(error)) from None


def write_card(directory: Path, card: BaseCard) -> None:
    """Writes the card of a base that is still being built; a finished base is renamed into place whole."""
    (directory / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def verify(directory: Path) -> BaseCard:
    """Returns the card of a base that may be served: its gate passed, and no byte of it has changed.

    Reads all weights once. Files that the card does not list are refused too, since an engine loads whatever
    `*.safetensors` it finds. Raises CardMissing, CardInvalid, FilesUnexpected or ChecksumMismatch.
    """
    card = read_card(directory)
    if card.report is not None and not card.report.gate.passed:
        raise CardInvalid(str(directory), f"its gate did not pass: {card.report.gate.reason}")
    expected = {WEIGHTS: card.weights_sha256, **card.files_sha256}
    present = {path.name for path in checkpoint_files(directory)}
    if present != expected.keys():
        missing, unlisted = expected.keys() - present, present - expected.keys()
        raise FilesUnexpected(str(directory), tuple(sorted(missing)), tuple(sorted(unlisted)))
    for name, sha256 in expected.items():
        check_sha256(directory / name, sha256)
    return card


def checkpoint_files(directory: Path) -> list[Path]:
    """Lists the files of a base that an engine may read: all but the card and the report."""
    return sorted(path for path in directory.iterdir() if path.name not in (CARD, REPORT))


def checkpoint_facts(directory: Path) -> dict[str, Any]:
    """Returns the card fields that a finished checkpoint determines: shape, sizes, hashes, and the time."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    files = checkpoint_files(directory)
    hashes = {path.name: sha256_of(path) for path in files}
    return {
        "architecture": config["architectures"][0],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "max_context_tokens": config["max_position_embeddings"],
        "weights_sha256": hashes.pop(WEIGHTS),
        "files_sha256": hashes,
        "bytes_on_disk": sum(path.stat().st_size for path in files),
        "created_at": datetime.now(UTC),
    }


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raises ChecksumMismatch unless the file's SHA-256 is the expected one."""
    actual = sha256_of(path)
    if actual != expected:
        raise ChecksumMismatch(str(path), expected, actual)


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Returns the installed versions of the distributions that made an artefact."""
    return {name: version(name) for name in names}


def problems_of(error: ValidationError) -> str:
    """Returns all of pydantic's complaints on one line."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}" for problem in error.errors()
    )

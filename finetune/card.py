"""The card of an adapter: its data, base, recipe and hashes, its metrics, and the gate's verdict.

`serve` imports this module, so it must stay free of torch, transformers and peft.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from finetune.atomic_files import write_atomically
from finetune.errors import CardError, CardMismatch, CardUnreadable, InvalidName
from finetune.hashing import file_sha256, json_sha256

__all__ = [
    "ADAPTER_CONFIG_NAME",
    "CARD_NAME",
    "NAME_PATTERN",
    "WEIGHTS_NAME",
    "AdapterCard",
    "CardError",
    "CardMismatch",
    "CardUnreadable",
    "Data",
    "Gate",
    "InvalidName",
    "Libraries",
    "Metrics",
    "content_version",
    "read_card",
    "validate_name",
    "verify",
    "write_card",
]

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
ADAPTER_CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "card.json"

_FILES = {ADAPTER_CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
_CARD_BYTES_MAX = 1 << 20


def validate_name(name: str) -> str:
    """Returns the name if it is a plain label: names become directory names, URLs and metric labels.

    Raises:
        InvalidName: it is not 1 to 63 lower-case letters, digits and inner hyphens.
    """
    # fullmatch, because `$` alone also matches before a final newline.
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidName(name)
    return name


def _pydantic_name(name: str) -> str:
    try:
        return validate_name(name)
    except InvalidName as error:
        raise ValueError(str(error)) from error


Name = Annotated[str, AfterValidator(_pydantic_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Version = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(_Part):
    """The data of a training run, in counts only: no card holds a row's text.

    `dropped` counts rows by reason. `trained_tokens` counts the tokens that training read, a row once per
    epoch; older cards lack it.
    """

    source_sha256: Sha256
    train_rows: int = Field(ge=1)
    heldout_rows: int = Field(ge=1)
    dropped: dict[str, int]
    trained_tokens: int | None = Field(None, ge=1, le=10**15)


class Libraries(_Part):
    torch: str
    transformers: str
    peft: str


class Metrics(_Part):
    """Metrics on held-out rows. NLLs are means over answer tokens, in nats.

    `difference` is adapter minus base: negative is better. `difference_ci95` is its paired
    bootstrap interval, lower bound first.
    """

    heldout_rows: int = Field(ge=1)
    heldout_answer_tokens: int = Field(ge=1)
    base_nll: float
    adapter_nll: float
    difference: float
    difference_ci95: tuple[float, float]
    base_perplexity: float
    adapter_perplexity: float
    bootstrap_resamples: int = Field(ge=1)
    bootstrap_seed: int


class Gate(_Part):
    rule: str
    passed: bool
    reason: str


class AdapterCard(_Part):
    """One immutable version of one tenant's adapter, as `card.json` beside its weights."""

    schema_version: Literal[1] = 1
    tenant: Name
    adapter: Name
    version: Version
    base: Name
    base_sha256: Sha256
    rank: int = Field(ge=1)
    target_modules: tuple[str, ...]
    data: Data
    config: dict[str, Any]
    config_sha256: Sha256
    weights_sha256: Sha256
    adapter_config_sha256: Sha256
    seed: int
    libraries: Libraries
    metrics: Metrics
    gate: Gate
    created_at: AwareDatetime


def content_version(adapter_dir: Path) -> str:
    """Computes the version of an adapter from its bytes: 16 hex digits.

    They are the first 16 of the SHA-256 over the canonical JSON list of (file name, SHA-256 of its bytes) of
    the two files that an engine loads. The card is left out: later cards may describe the same adapter anew.

    Raises:
        CardUnreadable: one of the two files is missing.
    """
    return _version(_hashes(adapter_dir))


def read_card(directory: Path) -> AdapterCard:
    """Reads the card of an adapter directory, which must hold an adapter's three files and nothing else.

    A further file might be a pickle, code, or one that some loader prefers to the hashed file.

    Raises:
        CardUnreadable: a further file, a missing file, or a card that does not parse.
    """
    try:
        entries = list(directory.iterdir())
    except OSError as error:
        raise CardUnreadable(directory, f"cannot be listed: {error.strerror}") from error
    present = {entry.name for entry in entries}
    if unexpected := sorted(present - _FILES):
        raise CardUnreadable(directory, f"unexpected {', '.join(unexpected)}")
    if missing := sorted(_FILES - present):
        raise CardUnreadable(directory, f"missing {', '.join(missing)}")
    if irregular := sorted(entry.name for entry in entries if entry.is_symlink() or not entry.is_file()):
        raise CardUnreadable(directory, f"not plain files: {', '.join(irregular)}")
    path = directory / CARD_NAME
    if path.stat().st_size > _CARD_BYTES_MAX:
        raise CardUnreadable(directory, f"{CARD_NAME} is larger than {_CARD_BYTES_MAX} bytes")
    try:
        return AdapterCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or CARD_NAME
        raise CardUnreadable(directory, f"{CARD_NAME}: {where}: {first['msg']}") from error


def write_card(directory: Path, card: AdapterCard) -> None:
    """Writes `card.json`, atomically and durably."""
    write_atomically(directory / CARD_NAME, card.model_dump_json(indent=2) + "\n")


def verify(directory: Path) -> AdapterCard:
    """Returns the card after checking every hash in it against the bytes beside it.

    Raises:
        CardUnreadable: see `read_card`.
        CardMismatch: a hash or the version differs.
    """
    card = read_card(directory)
    hashes = _hashes(directory)
    for field, expected, actual in (
        ("weights_sha256", card.weights_sha256, hashes[WEIGHTS_NAME]),
        ("adapter_config_sha256", card.adapter_config_sha256, hashes[ADAPTER_CONFIG_NAME]),
        ("config_sha256", card.config_sha256, json_sha256(card.config)),
        ("version", card.version, _version(hashes)),
    ):
        if expected != actual:
            raise CardMismatch(directory, field, expected, actual)
    return card


def _hashes(directory: Path) -> dict[str, str]:
    names = (ADAPTER_CONFIG_NAME, WEIGHTS_NAME)
    try:
        return {name: file_sha256(directory / name) for name in names}
    except OSError as error:
        raise CardUnreadable(directory, f"cannot read {error.filename}: {error.strerror}") from error


def _version(hashes: dict[str, str]) -> str:
    return json_sha256([[name, hashes[name]] for name in sorted(hashes)])[:16]

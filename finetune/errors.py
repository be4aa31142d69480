"""Errors of preparing, training and publishing, as one tree.

    FinetuneError
    ├── InvalidName            a tenant, adapter or base name that is not a plain label
    ├── DataError
    │   ├── DataUnreadable     no such file, or it exceeds a bound as a whole
    │   └── TooFewRows         too little is left to train on and to measure with
    ├── ConfigInvalid          a job or recipe file, with every problem at once
    ├── BaseUnusable           a missing base checkpoint, or one that cannot be trained on
    ├── TrainingDiverged       a loss that is not a finite number
    ├── GateFailed             an adapter that is not better than its base, which is never published
    └── CardError
        ├── CardUnreadable     a directory without exactly an adapter's three files, or no card
        └── CardMismatch       bytes that differ from those that the card describes

Each error has its data as attributes, and its constructor's arguments as `args`, so it survives pickling:
a training job may run in another process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class FinetuneError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidName(FinetuneError):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"invalid name {self.name[:80]!r}: use 1 to 63 lower-case letters, digits and hyphens, "
            "with a letter or digit at both ends"
        )


class DataError(FinetuneError):
    """The customer's file cannot become a training set."""


class DataUnreadable(DataError):
    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class TooFewRows(DataError):
    """Too few rows of one kind: `side` is "usable", "training" or "held-out"."""

    def __init__(self, path: Path, side: str, rows: int, rows_min: int, dropped: dict[str, int]) -> None:
        super().__init__(path, side, rows, rows_min, dropped)
        self.path = path
        self.side = side
        self.rows = rows
        self.rows_min = rows_min
        self.dropped = dropped

    def __str__(self) -> str:
        message = f"{self.path}: {self.rows} {self.side} rows, at least {self.rows_min} are needed"
        if self.dropped:
            message += f" (dropped: {', '.join(f'{count} {why}' for why, count in self.dropped.items())})"
        return message


class ConfigInvalid(FinetuneError):
    def __init__(self, path: Path, problems: tuple[str, ...]) -> None:
        super().__init__(path, problems)
        self.path = path
        self.problems = problems

    def __str__(self) -> str:
        return f"{self.path}: {'; '.join(self.problems)}"


class BaseUnusable(FinetuneError):
    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(directory, reason)
        self.directory = directory
        self.reason = reason

    def __str__(self) -> str:
        return f"base {self.directory}: {self.reason}"


class TrainingDiverged(FinetuneError):
    def __init__(self, step: int, loss: float) -> None:
        super().__init__(step, loss)
        self.step = step
        self.loss = loss

    def __str__(self) -> str:
        return f"training diverged: the loss at step {self.step} is {self.loss}; lower learning_rate"


class GateFailed(FinetuneError):
    """An adapter did not beat its base. `metrics` are its card's, as JSON values under the same names."""

    def __init__(self, rule: str, reason: str, metrics: dict[str, Any]) -> None:
        super().__init__(rule, reason, metrics)
        self.rule = rule
        self.reason = reason
        self.metrics = metrics

    def __str__(self) -> str:
        return f"gate failed, nothing was published: {self.reason} (rule: {self.rule})"


class CardError(FinetuneError):
    """An adapter directory that must not be served."""


class CardUnreadable(CardError):
    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(directory, reason)
        self.directory = directory
        self.reason = reason

    def __str__(self) -> str:
        return f"adapter {self.directory}: {self.reason}"


class CardMismatch(CardError):
    def __init__(self, directory: Path, field: str, expected: str, actual: str) -> None:
        super().__init__(directory, field, expected, actual)
        self.directory = directory
        self.field = field
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return (
            f"adapter {self.directory}: {self.field} is {self.actual}, but its card says {self.expected}: "
            "the files changed after publishing"
        )

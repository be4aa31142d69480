"""Errors keep their data and message when they are pickled."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune import errors
from finetune.errors import FinetuneError


def leaves(error: type[FinetuneError]) -> Iterator[type[FinetuneError]]:
    below = error.__subclasses__()
    for subclass in below:
        yield from leaves(subclass)
    if not below:
        yield error


def test_every_error_survives_pickling_with_its_data_and_message() -> None:
    arguments: dict[type[FinetuneError], tuple[object, ...]] = {
        errors.InvalidName: ("../x",),
        errors.DataUnreadable: (Path("rows.jsonl"), "gone"),
        errors.TooFewRows: (Path("rows.jsonl"), "usable", 3, 20, {"broken_json": 2}),
        errors.ConfigInvalid: (Path("job.yaml"), ("rank: too large", "seed: missing")),
        errors.BaseUnusable: (Path("base"), "no weights"),
        errors.TrainingDiverged: (4, float("inf")),
        errors.GateFailed: ("better", "worse", {"difference": 0.2}),
        errors.CardUnreadable: (Path("adapter"), "no card"),
        errors.CardMismatch: (Path("adapter"), "version", "a", "b"),
    }
    assert set(arguments) == set(leaves(FinetuneError))
    for kind, given in arguments.items():
        error = kind(*given)
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert vars(copy) == vars(error)
        assert str(copy) == str(error)


@pytest.mark.parametrize("name", ["x" * 100_000, "a\nb"])
def test_a_hostile_name_makes_a_short_one_line_message(name: str) -> None:
    message = str(errors.InvalidName(name))
    assert len(message) < 300
    assert "\n" not in message

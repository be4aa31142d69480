"""Errors keep their data and message when they are pickled."""

import pickle
from dataclasses import fields

import pytest

from quantize import errors
from quantize.errors import GateFailed, QuantizeError

LEAVES = sorted(QuantizeError.__subclasses__(), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling_with_its_data(kind: type[QuantizeError]) -> None:
    error = kind(**{field.name: f"<{field.name}>" for field in fields(kind)})
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)
    assert "{" not in str(error)


def test_the_docstring_draws_every_error() -> None:
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in LEAVES)


def test_a_failed_gate_says_why_and_carries_the_report() -> None:
    report = {"perplexity_before": 10.0, "perplexity_after": 14.0}
    error = pickle.loads(pickle.dumps(GateFailed("tiny-nf4", "too dear", report)))
    assert str(error) == "tiny-nf4 is not published: too dear"
    assert error.report == report

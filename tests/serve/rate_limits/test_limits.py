"""Tests which limits may be set and what they allow."""

import pytest

from serve.errors import InvalidRequest
from serve.rate_limits.limits import HIGHEST, MODEL_LENGTH_MAX, MODELS_MAX, Limits, LimitStore
from serve.storage.database import Store
from tests.support.constants import NOON

FULL = Limits(5, 1000, 2, 2048, ("tiny", "acme/*"))


def test_a_subject_without_a_row_has_no_limits(store: Store) -> None:
    with store.read() as connection:
        assert LimitStore(store).of(connection, "tenant", "acme") == Limits()


def test_limits_are_read_back_as_they_were_set_and_setting_replaces_all_of_them(store: Store) -> None:
    book = LimitStore(store)
    with store.write() as connection:
        book.set(connection, "key", "key_1", FULL, at=NOON)
        assert book.of(connection, "key", "key_1") == FULL
        book.set(connection, "key", "key_1", Limits(tokens_per_min=7), at=NOON)
        assert book.of(connection, "key", "key_1") == Limits(tokens_per_min=7)


def test_a_tenant_and_a_key_of_one_name_have_limits_of_their_own(store: Store) -> None:
    book = LimitStore(store)
    with store.write() as connection:
        book.set(connection, "tenant", "acme", FULL, at=NOON)
        assert book.of(connection, "key", "acme") == Limits()


@pytest.mark.parametrize("field", HIGHEST)
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "5", 10**13])
def test_a_number_that_cannot_be_a_limit_is_refused_by_name_and_changes_nothing(
    store: Store, field: str, value: object
) -> None:
    book = LimitStore(store)
    with store.write() as connection:
        book.set(connection, "tenant", "acme", FULL, at=NOON)
        with pytest.raises(InvalidRequest) as refused:
            book.set(connection, "tenant", "acme", Limits(**{field: value}), at=NOON)  # type: ignore[arg-type]
        assert refused.value.param == field
        assert book.of(connection, "tenant", "acme") == FULL


@pytest.mark.parametrize("field", HIGHEST)
def test_the_bounds_themselves_are_taken(store: Store, field: str) -> None:
    book = LimitStore(store)
    for value in (1, HIGHEST[field]):
        with store.write() as connection:
            book.set(connection, "tenant", "acme", Limits(**{field: value}), at=NOON)
            assert getattr(book.of(connection, "tenant", "acme"), field) == value


@pytest.mark.parametrize(
    "models", [(), ("",), ("a*b",), ("**",), ("x" * (MODEL_LENGTH_MAX + 1),), ("x",) * (MODELS_MAX + 1), (1,)]
)
def test_models_that_cannot_be_a_limit_are_refused_by_name(models: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Limits(models=models).validate()
    assert refused.value.param == "models"


@pytest.mark.parametrize(
    ("models", "model", "allowed"),
    [
        (None, "anything", True),
        (("tiny",), "tiny", True),
        (("tiny",), "tiny2", False),
        (("acme/*",), "acme/support", True),
        (("acme/*",), "acme2/support", False),
        (("acme/support*",), "acme/support@3f9c1a", True),
        (("acme/support",), "acme/support@3f9c1a", False),
        (("*",), "anything", True),
    ],
)
def test_a_model_is_allowed_by_its_name_or_a_prefix(
    models: tuple[str, ...] | None, model: str, allowed: bool
) -> None:
    assert Limits(models=models).allows(model) is allowed

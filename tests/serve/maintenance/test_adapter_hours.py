"""Tests the charges besides requests: training, once, and ready adapters, by the hour."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from finetune.card import read_card, write_card
from serve.billing.credits.charges import charges_table
from serve.billing.invoicing.invoices import Invoices
from serve.maintenance.adapter_hours import HOURS_MAX, charge_residency
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import AdapterVersion
from tests.serve.billing.invoicing.test_calculation import MONTH
from tests.serve.billing.invoicing.test_invoices import on_plan
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, TINY
from tests.support.lora_samples import publish_base, publish_sample

HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Works:
    """Provides a shop's tenant with an adapter and its folder."""

    shop: BillingFixture
    registry: AdapterRegistry
    home: Path

    def enter(self, *, trained_tokens: int | None = None) -> AdapterVersion:
        directory = publish_sample(self.home, "acme", "support")
        card = read_card(directory)
        data = card.data.model_copy(update={"trained_tokens": trained_tokens})
        write_card(directory, card.model_copy(update={"data": data}))
        base_dir = self.home / "bases" / TINY
        first = self.registry.register(directory, at=NOON, base_dir=base_dir, max_rank=16)
        assert self.registry.register(directory, at=NOON, base_dir=base_dir, max_rank=16) == first
        return first

    def charges(self) -> list[tuple[str, int]]:
        c = charges_table.c
        with self.shop.store.read() as connection:
            rows = connection.execute(sa.select(c.reference, c.amount_nanos).order_by(c.id))
            return [(row.reference, row.amount_nanos) for row in rows]


@pytest.fixture
def works(shop: BillingFixture, tmp_path: Path) -> Works:
    publish_base(tmp_path, TINY)
    return Works(shop, AdapterRegistry(shop.store, [TINY]), tmp_path)


def test_training_is_billed_once_when_its_version_is_registered(works: Works) -> None:
    on_plan(works.shop, training_nanos_per_mtok=3_000_000)
    adapter = works.enter(trained_tokens=500_001)
    assert works.charges() == [(f"training:{adapter.id}", 1_500_003)]
    assert works.shop.ledger.account("acme").spent_nanos == 1_500_003
    (line,) = Invoices(works.shop.store).create("acme", MONTH, at=NOON).document.lines
    assert (line.kind, line.items[0].quantity, line.amount_nanos) == ("training", 500_001, 1_500_003)


def test_training_is_free_without_a_price_or_with_a_card_that_does_not_say(works: Works) -> None:
    works.enter(trained_tokens=None)
    assert works.charges() == []


def test_each_hour_in_which_a_version_is_ready_is_billed_once_also_those_that_were_missed(
    works: Works,
) -> None:
    on_plan(works.shop, adapter_hour_nanos=5)
    adapter = works.enter()
    assert charge_residency(works.shop.store, NOON + 3 * HOUR) == 0  # no engine has probed it
    works.registry.mark_ready(adapter, NOON + timedelta(minutes=90))
    assert (
        charge_residency(works.shop.store, NOON + HOUR + timedelta(minutes=59)) == 0
    )  # the hour is not over
    assert charge_residency(works.shop.store, NOON + 4 * HOUR) == 3
    assert charge_residency(works.shop.store, NOON + 4 * HOUR) == 0
    assert works.charges()[0] == (f"residency:{adapter.id}:2026-11-22T13", 5)
    works.registry.retire(adapter, NOON + timedelta(hours=5, minutes=1))
    assert charge_residency(works.shop.store, NOON + 9 * HOUR) == 2
    (line,) = Invoices(works.shop.store).create("acme", MONTH, at=NOON).document.lines
    assert (line.kind, line.items[0].quantity, line.amount_nanos) == ("residency", 5, 25)


def test_what_was_missed_is_caught_up_with_up_to_a_bound(works: Works) -> None:
    on_plan(works.shop, adapter_hour_nanos=5)
    works.registry.mark_ready(works.enter(), NOON)
    assert charge_residency(works.shop.store, NOON + 2 * HOURS_MAX * HOUR) == HOURS_MAX


def test_nothing_is_billed_for_hours_whose_plan_has_no_price_for_them(works: Works) -> None:
    works.registry.mark_ready(works.enter(), NOON)
    assert charge_residency(works.shop.store, NOON + 5 * HOUR) == 0

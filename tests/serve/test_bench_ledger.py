"""The ledger's benchmark runs in small: its data is consistent, and its queries are answered."""

from contextlib import closing
from pathlib import Path

import pytest

from loadtests.bench import ledger
from serve.billing.ledger.verification import verify
from serve.settings import Settings
from serve.storage.database import Store


def test_what_is_filled_agrees_with_itself_and_can_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "ASKED", 1)
    read = ledger.reading(tmp_path, 3000, seed=1)
    assert set(read["answers_s"]) == set(ledger.questions("anybody"))
    assert read["invoice_s"] > 0
    with closing(Store(Settings(home=tmp_path).store_url)) as store:
        (hours,) = (one for one in verify(store) if one.name == "hours = usage events")
    assert hours.compared > 1000
    assert hours.mismatches == ()


def test_settlements_are_counted_and_timed(tmp_path: Path) -> None:
    figures = ledger.settlements(f"sqlite:///{tmp_path}/ledger.db", requests=600, timed=20)
    assert figures["settles_per_s"] > 0
    assert 0 < figures["p50_ms"] <= figures["p99_ms"]

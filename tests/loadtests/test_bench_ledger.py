"""The ledger's benchmark runs in small: its store agrees with itself, and its queries are answered."""

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
    monkeypatch.setattr(ledger, "REPEATS", 1)
    result = ledger.reading(tmp_path, 3000, seed=1)
    assert set(result["answers_s"]) == set(ledger.queries("anybody"))
    assert result["invoice_s"] > 0
    with closing(Store(Settings(home=tmp_path).store_url)) as store:
        (hours,) = (check for check in verify(store) if check.name == "hours = usage events")
    assert hours.compared > 1000
    assert hours.mismatches == ()


def test_settlements_are_counted_and_timed(tmp_path: Path) -> None:
    settled = ledger.settlements(f"sqlite:///{tmp_path}/ledger.db", requests=600, timed=20)
    assert settled["settles_per_s"] > 0
    assert 0 < settled["p50_ms"] <= settled["p99_ms"]

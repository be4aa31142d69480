"""Usage, costs, forecast and balance over HTTP: for the operator, and for two tenants."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import httpx
import openai
import pytest
from fastapi import FastAPI

from serve.api import errors, organization
from serve.api.dependencies import Context
from serve.api.organization import costs, forecast, usage
from serve.billing.budgets.service import BudgetService
from serve.billing.credits.charges import Charge, post_charge
from serve.billing.ledger.holds import Hold
from serve.billing.metering.events import UsageEvent
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON
from tests.support.databases import on_sqlite
from tests.support.usage_events import usage_event

Json = dict[str, Any]
BILLING = frozenset({"billing-read"})
MIDNIGHT = NOON.replace(hour=0)
LEASE = timedelta(minutes=5)
DAY_S = 86_400


class Office:
    """Serves the organization API for two tenants; the time is noon."""

    def __init__(self, shop: BillingFixture) -> None:
        self.shop, tenants = shop, shop.tenants
        given = {"tenants": tenants, "store": shop.store}
        blank = dict.fromkeys(Context.__dataclass_fields__.keys() - given.keys())
        self.app = FastAPI()
        self.app.state.context = Context(**cast(Any, given | blank))
        self.app.include_router(organization.router)
        errors.install(self.app)
        tenants.create("rival", at=NOON)
        shop.ledger.open_account("rival", 10**12)
        _, self.platform = tenants.platform_keys.create("ops", at=NOON)
        self.keys = {
            tenant: tenants.create_key(tenant, at=NOON, scopes=BILLING)[1] for tenant in ("acme", "rival")
        }
        self.key_ids = {tenant: tenants.create_key(tenant, at=NOON)[0].id for tenant in ("acme", "rival")}
        self.price_ids = {"acme": self.shop.price.id, "rival": self.shop.price.id}
        self._requests = 0

    def use(self, at: datetime, tenant: str = "acme", **changes: Any) -> UsageEvent:
        """A request of 10 prompt tokens, 4 of them cached, and 5 completion tokens: 1000 nano-USD."""
        self._requests += 1
        event = usage_event(
            f"r{self._requests}",
            plan_id=self.price_ids[tenant],
            at=at,
            **{"tenant": tenant, "key_id": self.key_ids[tenant], "cost_nanos": 1000} | changes,
        )
        hold = Hold(event.request_id, tenant, event.cost_nanos)
        self.shop.ledger.hold(hold, at=at, lease=LEASE)
        assert self.shop.ledger.settle(hold, event, at=at)
        return event

    def charge(self, reference: str, at: datetime, nanos: int) -> None:
        with self.shop.store.write() as connection:
            charged = Charge(
                reference, "acme", "training", "acme/support@1", 9, self.shop.price.id, nanos, at
            )
            assert post_charge(connection, charged)

    def ask(self, path: str, key: str | None = None, **params: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://office") as client:
                headers = {"authorization": f"Bearer {key or self.keys['acme']}"}
                return await client.get(f"/v1/organization/{path}", params=params, headers=headers)

        return asyncio.run(send())

    def completions(self, key: str | None = None, **params: Any) -> Json:
        answer = self.ask("usage/completions", key, **params)
        assert answer.status_code == 200, answer.text
        return cast(Json, answer.json())

    def costs(self, key: str | None = None, **params: Any) -> Json:
        answer = self.ask("costs", key, **params)
        assert answer.status_code == 200, answer.text
        return cast(Json, answer.json())

    @contextmanager
    def client(self) -> Iterator[openai.AsyncOpenAI]:
        transport = httpx.ASGITransport(self.app)
        yield openai.AsyncOpenAI(
            api_key="none",
            admin_api_key=self.platform,
            base_url="http://office/v1",
            http_client=httpx.AsyncClient(transport=transport),
            max_retries=0,
        )


@pytest.fixture
def office(shop: BillingFixture, monkeypatch: pytest.MonkeyPatch) -> Office:
    for module in (usage, costs, forecast):
        monkeypatch.setattr(module, "now", lambda: NOON)
    return Office(shop)


def s(at: datetime) -> int:
    return int(at.timestamp())


def results(page: Json) -> list[list[Json]]:
    return [bucket["results"] for bucket in page["data"]]


@on_sqlite
def test_a_day_is_summed_in_openais_shape(office: Office) -> None:
    office.use(MIDNIGHT + timedelta(hours=1))
    office.use(MIDNIGHT + timedelta(hours=2))
    page = office.completions(start_time=s(MIDNIGHT))
    assert page == {
        "object": "page",
        "data": [
            {
                "object": "bucket",
                "start_time": s(MIDNIGHT),
                "end_time": s(MIDNIGHT) + DAY_S,
                "results": [
                    {
                        "object": "organization.usage.completions.result",
                        "input_tokens": 20,
                        "input_cached_tokens": 8,
                        "output_tokens": 10,
                        "input_audio_tokens": 0,
                        "output_audio_tokens": 0,
                        "num_model_requests": 2,
                        "tenant": None,
                        "project_id": None,
                        "user_id": None,
                        "api_key_id": None,
                        "model": None,
                        "batch": None,
                        "service_tier": None,
                    }
                ],
            }
        ],
        "has_more": False,
        "next_page": None,
    }


@on_sqlite
def test_days_in_which_nothing_was_used_are_there_and_empty(office: Office) -> None:
    office.use(MIDNIGHT - timedelta(days=2))
    page = office.completions(start_time=s(MIDNIGHT) - 3 * DAY_S)
    assert [bucket["start_time"] for bucket in page["data"]] == [
        s(MIDNIGHT) - days * DAY_S for days in (3, 2, 1, 0)
    ]
    assert [len(buckets) for buckets in results(page)] == [0, 1, 0, 0]


@on_sqlite
def test_a_window_that_cuts_hours_counts_to_the_second(office: Office) -> None:
    start = MIDNIGHT + timedelta(hours=1, minutes=30)
    end = MIDNIGHT + timedelta(hours=5, minutes=30)
    second = timedelta(seconds=1)
    for at in (start - second, start, start + timedelta(hours=1), end - second, end):
        office.use(at)
    page = office.completions(start_time=s(start), end_time=s(end))
    (bucket,) = page["data"]
    assert (bucket["start_time"], bucket["end_time"]) == (s(start), s(end))
    assert bucket["results"][0]["num_model_requests"] == 3
    hours = office.completions(start_time=s(start), end_time=s(end), bucket_width="1h")
    assert [[one["num_model_requests"] for one in buckets] for buckets in results(hours)] == [
        [1],
        [1],
        [],
        [],
        [1],
    ]
    assert [bucket["start_time"] % 3600 for bucket in hours["data"]] == [1800, 0, 0, 0, 0]


@on_sqlite
def test_minutes_come_from_the_events(office: Office) -> None:
    office.use(NOON - timedelta(minutes=2, seconds=-30))
    office.use(NOON - timedelta(minutes=2, seconds=-31))
    start = s(NOON) - 180
    page = office.completions(start_time=start, end_time=s(NOON), bucket_width="1m")
    assert [[one["num_model_requests"] for one in buckets] for buckets in results(page)] == [[], [2], []]


def test_pages_hold_every_bucket_once(office: Office) -> None:
    start = MIDNIGHT - timedelta(days=9, hours=5)
    for days in range(10):
        office.use(MIDNIGHT - timedelta(days=days))
    seen: list[Json] = []
    page = office.completions(start_time=s(start), limit=4)
    while True:
        seen += page["data"]
        if not page["has_more"]:
            break
        page = office.completions(start_time=s(start), limit=4, page=page["next_page"])
    assert page["next_page"] is None
    starts = [bucket["start_time"] for bucket in seen]
    assert starts == [s(start), *(s(MIDNIGHT) - days * DAY_S for days in range(9, -1, -1))]
    assert sum(one["num_model_requests"] for bucket in seen for one in bucket["results"]) == 10


def test_groups_tell_apart_what_they_name(office: Office) -> None:
    project = office.shop.tenants.projects.create("acme", "web", at=NOON).id
    office.use(MIDNIGHT, model="acme/support", adapter_version="acme/support@1", project=project)
    office.use(MIDNIGHT, tier="batch")
    office.use(MIDNIGHT)
    by = ["model", "batch", "project_id", "api_key_id"]
    (buckets,) = results(office.completions(start_time=s(MIDNIGHT), group_by=by))
    key = office.key_ids["acme"]
    assert [(one["project_id"], one["model"], one["batch"], one["api_key_id"]) for one in buckets] == [
        (None, "tiny", True, key),
        (None, "tiny", False, key),
        (project, "acme/support", False, key),
    ]
    assert len(results(office.completions(start_time=s(MIDNIGHT), group_by="model"))[0]) == 2


@on_sqlite
@pytest.mark.parametrize("suffix", ["", "[]"])
def test_filters_are_understood_in_both_spellings(office: Office, suffix: str) -> None:
    office.use(MIDNIGHT, model="one")
    office.use(MIDNIGHT, model="two")
    office.use(MIDNIGHT, model="three", tier="batch")

    def count(**params: Any) -> int:
        page = office.completions(start_time=s(MIDNIGHT), **params)
        return sum(one["num_model_requests"] for buckets in results(page) for one in buckets)

    assert count(**{f"models{suffix}": ["one", "two"]}) == 2
    assert count(**{f"models{suffix}": "one"}) == 1
    assert count(**{f"api_key_ids{suffix}": "nobodys"}) == 0
    assert count(**{f"project_ids{suffix}": "none"}) == 0
    assert (count(batch="true"), count(batch="false"), count()) == (1, 2, 3)


@on_sqlite
def test_a_tenant_sees_itself_and_the_operator_everybody(office: Office) -> None:
    office.use(MIDNIGHT)
    office.use(MIDNIGHT, "rival")
    office.use(MIDNIGHT, "rival")
    at = s(MIDNIGHT)
    assert [
        results(office.completions(key, start_time=at))[0][0]["num_model_requests"]
        for key in (office.keys["acme"], office.keys["rival"], office.platform)
    ] == [1, 2, 3]
    # Another tenant's key is no way in.
    assert results(office.completions(start_time=at, api_key_ids=office.key_ids["rival"])) == [[]]
    by = results(office.completions(office.platform, start_time=at, group_by="tenant"))[0]
    assert [(one["tenant"], one["num_model_requests"]) for one in by] == [("acme", 1), ("rival", 2)]
    one = results(office.completions(office.platform, start_time=at, tenant_ids="rival"))[0]
    assert one[0]["num_model_requests"] == 2
    for params in ({"group_by": "tenant"}, {"tenant_ids": "acme"}, {"tenant_ids[]": "rival"}):
        assert office.ask("usage/completions", start_time=at, **params).status_code == 400
    for path in ("forecast", "balance"):
        assert office.ask(path, tenant="rival").status_code == 400
        assert office.ask(path, tenant="acme").json()["tenant"] == "acme"


def test_costs_are_exact_and_hold_charges_too(office: Office) -> None:
    office.use(MIDNIGHT, cost_nanos=1)
    office.use(MIDNIGHT, cost_nanos=250_000_000, tier="batch", key_id=office.key_ids["acme"])
    office.charge("t1", MIDNIGHT + timedelta(minutes=1), 7)
    (buckets,) = results(office.costs(start_time=s(MIDNIGHT)))
    assert buckets == [
        {
            "object": "organization.costs.result",
            "amount": {"value": 0.250000008, "currency": "usd"},
            "amount_nanos": 250_000_008,
            "tenant": None,
            "line_item": None,
            "project_id": None,
            "api_key_id": None,
        }
    ]
    (items,) = results(office.costs(start_time=s(MIDNIGHT), group_by="line_item"))
    assert [(one["line_item"], one["amount_nanos"]) for one in items] == [
        ("tiny", 1),
        ("tiny (batch)", 250_000_000),
        ("training: acme/support@1", 7),
    ]
    (of_key,) = results(office.costs(start_time=s(MIDNIGHT), api_key_ids=office.key_ids["acme"]))
    assert of_key[0]["amount_nanos"] == 250_000_001
    assert results(office.costs(office.keys["rival"], start_time=s(MIDNIGHT))) == [[]]


@on_sqlite
@pytest.mark.parametrize(
    ("path", "params", "param"),
    [
        ("usage/completions", {}, "start_time"),
        ("usage/completions", {"start_time": "soon"}, "start_time"),
        ("usage/completions", {"start_time": -1}, "start_time"),
        ("usage/completions", {"start_time": 10**15}, "start_time"),
        ("usage/completions", {"start_time": s(NOON) + DAY_S}, "start_time"),
        ("usage/completions", {"start_time": 10, "end_time": 10}, "end_time"),
        ("usage/completions", {"start_time": 10, "user_ids": "u"}, "user_ids"),
        ("usage/completions", {"start_time": 10, "user_ids[]": "u"}, "user_ids[]"),
        ("usage/completions", {"start_time": 10, "batch": "perhaps"}, "batch"),
        ("usage/completions", {"start_time": 10, "bucket_width": "1w"}, "bucket_width"),
        ("usage/completions", {"start_time": 10, "group_by": "user_id"}, "group_by.0"),
        ("usage/completions", {"start_time": 10, "limit": 32}, "limit"),
        ("usage/completions", {"start_time": 10, "limit": 169, "bucket_width": "1h"}, "limit"),
        ("usage/completions", {"start_time": 10, "limit": 0}, "limit"),
        ("usage/completions", {"start_time": 10, "limit": 1441, "bucket_width": "1m"}, "limit"),
        ("usage/completions", {"start_time": 10, "models": ["m"] * 101}, "models"),
        ("usage/completions", {"start_time": 10, "models": "\0"}, "models.0"),
        ("usage/completions", {"start_time": 10, "page": "page_5"}, "page"),
        ("usage/completions", {"start_time": 10, "page": "page_86401"}, "page"),
        ("usage/completions", {"start_time": 10, "page": "page_999999999999"}, "page"),
        ("costs", {"start_time": 10, "bucket_width": "1h"}, "bucket_width"),
        ("costs", {"start_time": 10, "limit": 181}, "limit"),
        ("costs", {"start_time": 10, "group_by": "model"}, "group_by.0"),
        ("forecast", {"tenant": "No Such"}, "tenant"),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(office: Office, path: str, params: Json, param: str) -> None:
    answer = office.ask(path, **params)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@on_sqlite
@pytest.mark.parametrize("path", ["usage/completions", "costs", "forecast", "balance"])
def test_a_key_without_the_scope_is_refused_before_anything_is_looked_at(office: Office, path: str) -> None:
    _, inference = office.shop.tenants.create_key("acme", at=NOON)
    assert office.ask(path, inference, start_time="wrong").status_code == 403
    assert office.ask(path, "bsp-wrong", start_time="wrong").status_code == 401
    assert office.ask(path, "wrong", start_time="wrong").status_code == 401


@on_sqlite
def test_openais_client_reads_usage_and_costs(office: Office) -> None:
    office.use(MIDNIGHT, model="one")
    office.use(MIDNIGHT, model="two")

    async def read() -> None:
        with office.client() as client:
            usage = client.admin.organization.usage
            page = await usage.completions(
                start_time=s(MIDNIGHT), models=["one"], group_by=["model"], batch=False, bucket_width="1h"
            )
            buckets = cast(Any, page.data[0].results[0])
            assert (buckets.model, buckets.input_tokens, buckets.num_model_requests) == ("one", 10, 1)
            spent = await usage.costs(start_time=s(MIDNIGHT), group_by=["line_item"])
            items = cast(Any, spent.data[0].results)
            assert [(one.line_item, one.amount.value) for one in items] == [("one", 1e-06), ("two", 1e-06)]

    asyncio.run(read())


@on_sqlite
def test_a_forecast_adds_the_last_days_mean_for_each_day_that_is_left(office: Office) -> None:
    for days, nanos in ((1, 700), (2, 100), (3, 400)):  # the first was three days ago
        office.use(MIDNIGHT - timedelta(days=days), cost_nanos=nanos)
    office.use(MIDNIGHT, cost_nanos=50, model="other")
    charged = office.ask("forecast").json()
    # 22 November, noon: eight and a half days are left.
    assert charged["basis_days"] == 3
    assert (charged["start_time"], charged["end_time"]) == (
        s(datetime(2026, 11, 1, tzinfo=UTC)),
        s(datetime(2026, 12, 1, tzinfo=UTC)),
    )
    assert charged["totals"] == [
        {
            "line_item": None,
            "currency": "USD",
            "to_date_nanos": 1250,
            "projected_nanos": 1250 + 3400,
            "low_nanos": 1250 + 850,
            "high_nanos": 1250 + 5950,
        }
    ]
    assert [(one["line_item"], one["projected_nanos"]) for one in charged["line_items"]] == [
        ("other", 50),
        ("tiny", 1200 + 3400),
    ]
    nothing = office.ask("forecast", office.keys["rival"]).json()
    assert (nothing["basis_days"], nothing["totals"][0]["projected_nanos"]) == (0, 0)
    assert office.ask("forecast", office.platform).json()["totals"][0]["to_date_nanos"] == 1250


@on_sqlite
def test_the_balance_shows_credit_and_budgets_in_force(office: Office) -> None:
    budgets = BudgetService(office.shop.store)
    kept = budgets.create("acme", "tenant", "acme", "month", 5000, at=NOON).budget
    gone = budgets.create("acme", "tenant", "acme", "day", 5000, at=NOON).budget
    budgets.retire("acme", gone.id, at=NOON)
    office.use(NOON)
    office.shop.ledger.hold(Hold("open", "acme", 300), at=NOON, lease=LEASE)
    said = office.ask("balance").json()
    assert [said[name] for name in ("credit_nanos", "spent_nanos", "held_nanos", "available_nanos")] == [
        1_000_000_000,
        1000,
        300,
        1_000_000_000 - 1300,
    ]
    (budget,) = said["budgets"]
    assert (budget["id"], budget["spent_nanos"], budget["held_nanos"]) == (kept.id, 1000, 300)
    assert budget["left_nanos"] == 3700
    assert office.ask("balance", office.platform).json()["error"]["param"] == "tenant"
    assert office.ask("balance", office.platform, tenant="nobody").status_code == 404
    assert office.ask("balance", office.platform, tenant="acme").json() == said

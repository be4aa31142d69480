"""Requests with a key, batch lines and a budget's last requests are billed once, whatever dies."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import sqlalchemy as sa

from serve.billing.budgets.budgets import spend_table
from serve.billing.budgets.service import BudgetService
from serve.billing.ledger.accounts import HOLD_PHASE, transfers_table
from serve.billing.metering.events import attempts_table, usage_table
from tests.support.constants import NOON, TENANTS
from tests.support.waiting import wait_until
from tests.system.faults.fail_points import AFTER_SETTLE, BATCH_LEASE, IN_MID_STREAM, KILL, MID_TOKENS, at
from tests.system.faults.fault_site import FaultSite, chat_body, since

pytestmark = pytest.mark.slow

PARALLEL = 200
LINES = 6


def newest(site: FaultSite) -> int:
    """The last usage event until now."""
    with site.store.read() as connection:
        return connection.execute(sa.select(sa.func.coalesce(sa.func.max(usage_table.c.id), 0))).scalar_one()


def events_after(site: FaultSite, last: int) -> list[sa.RowMapping]:
    query = sa.select(usage_table).where(usage_table.c.id > last).order_by(usage_table.c.id)
    with site.store.read() as connection:
        return list(connection.execute(query).mappings())


def failed_attempts(site: FaultSite, request_id: str) -> int:
    c = attempts_table.c
    query = sa.select(sa.func.count()).where(c.request_id == request_id, c.completion_tokens > 0)
    with site.store.read() as connection:
        return connection.execute(query).scalar_one()


@pytest.mark.parametrize("moment", [IN_MID_STREAM, AFTER_SETTLE])
def test_a_request_with_a_key_is_billed_once_though_its_gateway_dies(site: FaultSite, moment: str) -> None:
    marker = f"once-{MID_TOKENS if moment == IN_MID_STREAM else 0}"
    last, point = newest(site), at("gateway", moment)
    site.fail_points.set(point, marker, KILL)
    request, key = chat_body(marker, 80), {"Idempotency-Key": marker}
    with pytest.raises(httpx.TransportError):  # nobody is left to answer; clients try again
        site.post(request, **key)
    killed_s = time.monotonic()
    hit = site.wait_hit(point, marker)
    answers: list[httpx.Response] = []

    def answered() -> bool:
        answers.append(site.post(request, **key))
        return answers[-1].status_code == 200

    wait_until(answered, 60, 0.25)
    took_s = since(killed_s)
    again = site.post(request, **key)
    assert {answer.status_code for answer in answers[:-1]} <= {409, 503}
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json() == answers[-1].json()
    (event,) = events_after(site, last)
    assert event["completion_tokens"] == 80
    if moment == AFTER_SETTLE:
        assert event["request_id"] == hit.request_id == again.headers["x-original-request-id"]
    else:
        closing = site.closing(hit.request_id)
        assert closing is not None
        assert (closing["kind"], closing["reason"]) == ("void", "gateway died")
        assert failed_attempts(site, hit.request_id) == 1
    refused = sorted({str(answer.status_code) for answer in answers[:-1]})
    client_got = ", then ".join(("a connection that is closed", *refused, "the whole answer"))
    site.note("gateway of a request with a key", moment, client_got, "settled once", took_s)


def test_each_line_of_a_batch_is_billed_once_though_its_gateway_dies(site: FaultSite) -> None:
    last, client, point = newest(site), site.client(), at("gateway", IN_MID_STREAM)
    site.fail_points.set(point, "line-3", KILL)
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": chat_body(f"line-{number}", MID_TOKENS * 2),
        }
        for number in range(LINES)
    ]
    content = "\n".join(json.dumps(line) for line in lines).encode()
    uploaded = client.files.create(file=("work.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    hit, killed_s = site.wait_hit(point, "line-3"), time.monotonic()
    client = client.with_options(max_retries=5)  # this one may have been with the gateway that died
    limit_s = BATCH_LEASE.total_seconds() + 60
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", limit_s, 0.25)
    took_s = since(killed_s)
    finished = client.batches.retrieve(batch.id)
    assert finished.output_file_id is not None
    assert finished.request_counts is not None
    assert (finished.request_counts.completed, finished.request_counts.failed) == (LINES, 0)
    answers = [json.loads(line) for line in client.files.content(finished.output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in lines]
    billed = [event["request_id"] for event in events_after(site, last)]
    assert sorted(billed) == sorted(answer["response"]["request_id"] for answer in answers)
    assert hit.request_id not in billed
    client_got = f"{LINES} lines, {LINES} answers"
    site.note("gateway that runs a batch", IN_MID_STREAM, client_got, f"{LINES} settled, once each", took_s)


def test_a_hard_budget_is_not_overshot_by_200_requests_at_three_gateways(site: FaultSite) -> None:
    tenant, request = TENANTS[1], chat_body("within the budget", 1)
    assert site.post(request, tenant=tenant).status_code == 200
    last = newest(site)
    (event,) = events_after(site, last - 1)
    c = transfers_table.c
    with site.store.read() as connection:
        of = sa.select(c.amount_nanos).where(c.request_id == event["request_id"], c.phase == HOLD_PHASE)
        held_nanos = connection.execute(of).scalar_one()
    limit_nanos = 40 * event["cost_nanos"] + held_nanos
    created = BudgetService(site.store).create(tenant, "tenant", tenant, "total", limit_nanos, at=NOON)

    started_s = time.monotonic()
    headers = {"Authorization": f"Bearer {site.keys[tenant]}"}
    limits = httpx.Limits(max_connections=PARALLEL)
    with httpx.Client(limits=limits, timeout=120) as client, ThreadPoolExecutor(PARALLEL) as pool:
        url = f"{site.url}/v1/chat/completions"
        answers = list(pool.map(lambda _: client.post(url, json=request, headers=headers), range(PARALLEL)))
        took_s = since(started_s)
        passed = [answer for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert {(answer.status_code, answer.json()["error"]["code"]) for answer in refused} == {
            (429, "insufficient_quota")
        }
        assert passed
        site.check()
        # What was refused only because others held it can still be spent, and then nothing more.
        more = 0
        while (answer := client.post(url, json=request, headers=headers)).status_code == 200:
            more += 1
            assert more < PARALLEL
    assert answer.json()["error"]["code"] == "insufficient_quota"
    site.wait_idle()
    costs = [event["cost_nanos"] for event in events_after(site, last)]
    assert len(costs) == len(passed) + more
    spend = sa.select(spend_table.c.spent_nanos).where(spend_table.c.budget_id == created.budget.id)
    with site.store.read() as connection:
        spent_nanos = connection.execute(spend).scalar_one()
    assert spent_nanos == event["cost_nanos"] + sum(costs)
    assert limit_nanos - held_nanos < spent_nanos <= limit_nanos
    client_got = f"{len(passed)} × 200, {len(refused)} × 429; then {more} more one by one"
    ledger = f"{spent_nanos} of {limit_nanos} nano-USD spent, 0 held"
    site.note(f"{PARALLEL} requests at a hard budget's edge", "all at once", client_got, ledger, took_s)

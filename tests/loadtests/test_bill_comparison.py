"""Clients, bill and engines are compared: each mismatch is named, and the exit code follows."""

from dataclasses import replace

import pytest

from loadtests.load.bill_comparison import (
    Bill,
    TokenCounts,
    Verdict,
    by_engine,
    by_model,
    by_request,
    engines_at_least,
    engines_counted,
)
from loadtests.load.request_record import Outcome, RequestRecord
from serve.billing.metering.events import EngineTotal
from serve.billing.metering.reconciliation import EngineCount, reconcile
from serve.billing.pricing.plans import Tokens

MODEL = ("acme", "acme/support")
COMPLETE = RequestRecord("row", *MODEL, 100, 64, "req_1", Outcome.COMPLETE, 200, None, Tokens(20, 16, 9), 9)
LEFT = RequestRecord("row", *MODEL, 100, 64, "req_2", Outcome.LEFT, 200, pieces=3)
REFUSED = RequestRecord("row", *MODEL, 100, 64, "req_3", Outcome.REFUSED, 429, "rate_limit_exceeded")
BROKEN = RequestRecord("row", *MODEL, 100, 64, "req_4", Outcome.FAILED, 200, "stream_cut", pieces=2)
UNKNOWN = RequestRecord("row", *MODEL, 100, 64, None, Outcome.FAILED, 0, "ConnectionResetError")
UNAVAILABLE = RequestRecord("row", *MODEL, 100, 64, "req_5", Outcome.REFUSED, 503, "service_unavailable")


def bill(prompt: int = 20, cached: int = 16, completion: int = 9, model: tuple[str, str] = MODEL) -> Bill:
    return Bill(*model, TokenCounts(1, prompt, cached, completion))


def test_a_complete_answer_is_billed_exactly() -> None:
    assert by_request([COMPLETE], {"req_1": bill()}) == []


@pytest.mark.parametrize("wrong", [{"prompt": 21}, {"cached": 15}, {"completion": 8}, {"completion": 10}])
def test_a_complete_answer_that_is_billed_otherwise_is_named(wrong: dict[str, int]) -> None:
    (mismatch,) = by_request([COMPLETE], {"req_1": bill(**wrong)})
    ((what, billed),) = wrong.items()
    assert mismatch.subject.startswith("req_1 ")
    assert (mismatch.quantity, mismatch.billed) == (f"{what} tokens", str(billed))


def test_a_complete_answer_that_nobody_billed_is_named() -> None:
    mismatches = by_request([COMPLETE], {})
    assert {mismatch.quantity for mismatch in mismatches} == {
        "requests",
        "prompt tokens",
        "cached tokens",
        "completion tokens",
    }


def test_a_bill_for_another_model_or_tenant_is_named() -> None:
    (mismatch,) = by_request([COMPLETE], {"req_1": bill(model=("acme", "tiny"))})
    assert (mismatch.expected, mismatch.billed) == ("acme acme/support", "acme tiny")


@pytest.mark.parametrize(("completion", "agrees"), [(2, False), (3, True), (64, True), (65, False)])
def test_a_client_that_left_is_billed_what_it_saw_or_more_and_not_more_than_it_asked_for(
    completion: int, agrees: bool
) -> None:
    assert (by_request([LEFT], {"req_2": bill(completion=completion)}) == []) is agrees


def test_a_client_that_left_before_it_saw_anything_may_be_billed_or_not() -> None:
    early = replace(LEFT, pieces=0)
    assert by_request([early], {}) == by_request([early], {"req_2": bill(completion=1)}) == []
    assert by_request([LEFT], {}) != []  # a client that saw something is billed


def test_a_stream_that_broke_is_billed_what_was_delivered() -> None:
    assert by_request([BROKEN], {"req_4": bill(completion=2)}) == []
    assert by_request([BROKEN], {"req_4": bill(completion=1)}) != []


def test_a_refusal_is_never_billed() -> None:
    assert by_request([REFUSED], {}) == []
    assert by_request([REFUSED], {"req_3": bill()}) != []


def test_a_server_error_may_have_been_billed() -> None:
    assert by_request([UNAVAILABLE], {}) == by_request([UNAVAILABLE], {"req_5": bill()}) == []


def test_a_bill_that_no_client_asked_for_is_named() -> None:
    (mismatch,) = by_request([COMPLETE], {"req_1": bill(), "req_9": bill()})
    assert (mismatch.subject, mismatch.expected) == ("req_9", "no client asked")


def test_a_bill_may_belong_to_a_client_without_an_answer() -> None:
    assert by_request([UNKNOWN], {"req_9": bill()}) == []
    assert len(by_request([UNKNOWN], {"req_8": bill(), "req_9": bill()})) == 2


def test_sums_by_model_agree_within_what_those_leave_open_that_left() -> None:
    records = [COMPLETE, COMPLETE, LEFT]
    assert by_model(records, {MODEL: TokenCounts(3, 60, 48, 18 + 5)}) == []
    (mismatch,) = by_model(records, {MODEL: TokenCounts(3, 60, 48, 18 + 2)})
    assert (mismatch.subject, mismatch.expected) == ("acme: acme/support", "21 to 82")


def test_usage_of_a_model_that_nobody_asked_for_is_named() -> None:
    assert {mismatch.subject for mismatch in by_model([], {("acme", "tiny"): TokenCounts(1, 5, 0, 2)})} == {
        "acme: tiny"
    }


def engine(completion: int, boot: str = "b1") -> EngineCount:
    return EngineCount("tiny", "r1", boot, 110, completion, 10, 2)


def test_an_engine_that_counted_what_was_billed_agrees() -> None:
    entries = reconcile([engine(42)], {("r1", "b1"): EngineTotal("r1", "b1", 100, 40)})
    assert by_engine(entries) == []


def test_an_engine_that_counted_more_than_was_billed_is_named() -> None:
    (mismatch,) = by_engine(reconcile([engine(43)], {("r1", "b1"): EngineTotal("r1", "b1", 100, 40)}))
    assert (mismatch.quantity, mismatch.expected, mismatch.billed) == ("completion tokens", "41", "40")


def test_what_engines_counted_in_a_run_leaves_out_their_checks_and_what_was_before() -> None:
    counted = engines_counted([engine(42)], [replace(engine(50), prompt_tokens=150), engine(22, boot="b2")])
    assert counted == TokenCounts(prompt=40 + 100, completion=8 + 20)


def test_engines_that_others_use_have_counted_our_bill_at_least() -> None:
    assert engines_at_least(TokenCounts(0, 50, 0, 9), TokenCounts(2, 50, 0, 9)) == []
    assert len(engines_at_least(TokenCounts(0, 49, 0, 8), TokenCounts(2, 50, 0, 9))) == 2


def test_the_exit_code_is_0_only_if_all_agree_and_nothing_failed() -> None:
    verdict = Verdict()
    assert verdict.exit_code(complete=5, failed=0) == 3  # nothing was compared
    verdict.add("by request", 5, [])
    assert verdict.exit_code(complete=5, failed=0) == 0
    assert verdict.exit_code(complete=5, failed=1) == 1
    assert verdict.exit_code(complete=0, failed=0) == 1
    verdict.add("by engine", 1, by_request([COMPLETE], {}))
    assert verdict.exit_code(complete=5, failed=0) == 3

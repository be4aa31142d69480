"""Runs the load tests' locustfile with one token too many counted in the first complete answer."""

import itertools

from loadtests.load.client import StreamTiming
from loadtests.load.measurements import Measurements
from loadtests.load.request_record import Outcome, RequestRecord
from loadtests.locustfile import *  # noqa: F403
from serve.billing.pricing.plans import Tokens

_count, _whole = Measurements.add, itertools.count()


def _miscount(self: Measurements, record: RequestRecord, timing: StreamTiming) -> None:
    if record.outcome is Outcome.COMPLETE and record.tokens and next(_whole) == 0:
        seen = record.tokens
        record.tokens = Tokens(seen.prompt, seen.cached, seen.completion + 1)
    _count(self, record, timing)


Measurements.add = _miscount  # type: ignore[method-assign]

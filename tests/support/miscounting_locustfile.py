"""The load tests' locustfile, but its clients count one token too many in the first answer that is whole."""

import itertools

from loadtests.load.client import Gaps
from loadtests.load.exchange import Exchange, Outcome
from loadtests.load.tally import Tally
from loadtests.locustfile import *  # noqa: F403
from serve.billing.pricing.plans import Tokens

_count, _whole = Tally.add, itertools.count()


def _miscount(self: Tally, exchange: Exchange, gaps: Gaps) -> None:
    if exchange.outcome is Outcome.COMPLETE and exchange.tokens and next(_whole) == 0:
        seen = exchange.tokens
        exchange.tokens = Tokens(seen.prompt, seen.cached, seen.completion + 1)
    _count(self, exchange, gaps)


Tally.add = _miscount  # type: ignore[method-assign]

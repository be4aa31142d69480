"""More adapters than an engine has slots, chosen by Zipf's law: how long do rare models' users wait?"""

from typing import Any

from locust import task

from loadtests.load.caller import Caller
from loadtests.load.tally import Tally
from loadtests.load.zipf import Zipf

POPULAR, RARE = "popular adapters", "rare adapters"


class Churn(Caller):
    max_tokens = (8, 32)

    def on_start(self) -> None:
        super().on_start()
        offers = self.session.target.offers
        self.adapters = [offer for offer in offers if "/" in offer.model] or list(offers)
        self.zipf = Zipf(len(self.adapters))

    @task
    def stream(self) -> None:
        rank = self.zipf.rank(self.random.random())
        self.ask(POPULAR if rank < self.zipf.popular else RARE, self.adapters[rank])


def findings(tally: Tally) -> dict[str, Any]:
    found: dict[str, Any] = {"models asked for": len({exchange.model for exchange in tally.exchanges})}
    if {POPULAR, RARE} <= tally.rows.keys():
        popular, rare = (tally.rows[name].ttft.quantile_ms(0.5) for name in (POPULAR, RARE))
        if popular and rare:
            found["TTFT p50, rare over popular"] = round(rare / popular, 2)
    return found


USERS = (Churn,)

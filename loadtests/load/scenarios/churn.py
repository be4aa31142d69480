"""Draws more adapters than an engine has slots by Zipf's law: how long do rare models' users wait?"""

from typing import Any

from locust import task

from loadtests.load.measurements import Measurements
from loadtests.load.user import LoadUser
from loadtests.load.zipf import Zipf

POPULAR, RARE = "popular adapters", "rare adapters"


class Churn(LoadUser):
    max_tokens = (8, 32)

    def on_start(self) -> None:
        super().on_start()
        models = self.load_run.service.models
        self.adapters = [model for model in models if "/" in model.name] or list(models)
        self.zipf = Zipf(len(self.adapters))

    @task
    def stream(self) -> None:
        rank = self.zipf.rank(self.random.random())
        self.send(POPULAR if rank < self.zipf.popular else RARE, self.adapters[rank])


def findings(measurements: Measurements) -> dict[str, Any]:
    results: dict[str, Any] = {"models asked for": len({record.model for record in measurements.records})}
    if {POPULAR, RARE} <= measurements.rows.keys():
        popular, rare = (measurements.rows[name].ttft.quantile_ms(0.5) for name in (POPULAR, RARE))
        if popular and rare:
            results["TTFT p50, rare over popular"] = round(rare / popular, 2)
    return results


USERS = (Churn,)

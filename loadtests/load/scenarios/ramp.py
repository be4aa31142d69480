"""Twice the users again and again, until more of them bring no more tokens: where is the knee?"""

import math
from typing import Any, ClassVar

from locust import LoadTestShape, task

from loadtests.load.caller import OVERLOAD, Caller
from loadtests.load.climb import Climb
from loadtests.load.tally import Tally

STEP_S, STEP_LEAST_S = 10.0, 4.0


class Ramp(Caller):
    expected = OVERLOAD

    @task
    def stream(self) -> None:
        self.ask(f"{self.session.users:>4} users", self.offer())


class RampShape(LoadTestShape):
    abstract = False
    use_common_options = True
    climb: ClassVar[Climb | None] = None

    def tick(self) -> tuple[int, float] | None:
        options, tally = self.runner.environment.parsed_options, self.runner.environment.loadtest.tally
        if RampShape.climb is None:
            most = options.num_users or 1
            steps = math.ceil(math.log2(most)) + 1
            step_s = max(STEP_LEAST_S, options.run_time / steps) if options.run_time else STEP_S
            RampShape.climb = Climb(most, step_s)
        users = RampShape.climb.at(self.get_run_time(), tally.tokens)
        return None if users is None else (users, float(users))

    def reset_time(self) -> None:
        super().reset_time()
        RampShape.climb = None


def findings(_: Tally) -> dict[str, Any]:
    climb = RampShape.climb
    if climb is None or (knee := climb.knee()) is None:
        return {}
    steps = {f"tokens_per_s with {step.users} users": round(step.tokens_per_s, 1) for step in climb.steps}
    return {**steps, "saturated": climb.saturated, "users at the knee": knee.users}


USERS = (Ramp,)
SHAPE = RampShape

"""Doubles the users until more of them bring no more tokens: where is the knee?"""

import math
from typing import Any, ClassVar

from locust import LoadTestShape, task

from loadtests.load.measurements import Measurements
from loadtests.load.ramp_schedule import RampSchedule
from loadtests.load.user import OVERLOAD, LoadUser

STEP_S, STEP_LEAST_S = 10.0, 4.0


class Ramp(LoadUser):
    expected_codes = OVERLOAD

    @task
    def stream(self) -> None:
        self.send(f"{self.load_run.users:>4} users", self.model())


class RampShape(LoadTestShape):
    abstract = False
    use_common_options = True
    schedule: ClassVar[RampSchedule | None] = None

    def tick(self) -> tuple[int, float] | None:
        options, measurements = (
            self.runner.environment.parsed_options,
            self.runner.environment.loadtest.measurements,
        )
        if RampShape.schedule is None:
            most = options.num_users or 1
            steps = math.ceil(math.log2(most)) + 1
            step_s = max(STEP_LEAST_S, options.run_time / steps) if options.run_time else STEP_S
            RampShape.schedule = RampSchedule(most, step_s)
        users = RampShape.schedule.users_at(self.get_run_time(), measurements.tokens)
        return None if users is None else (users, float(users))

    def reset_time(self) -> None:
        super().reset_time()
        RampShape.schedule = None


def findings(_: Measurements) -> dict[str, Any]:
    schedule = RampShape.schedule
    if schedule is None or (knee := schedule.knee()) is None:
        return {}
    steps = {f"tokens_per_s with {step.users} users": round(step.tokens_per_s, 1) for step in schedule.steps}
    return {**steps, "saturated": schedule.saturated, "users at the knee": knee.users}


USERS = (Ramp,)
SHAPE = RampShape

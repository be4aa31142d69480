"""Twice the users again and again, until more of them bring no more tokens: where is the knee?"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from locust import LoadTestShape, task

from loadtests.load.caller import OVERLOAD, Caller
from loadtests.load.tally import Tally

STEP_S, STEP_LEAST_S = 10.0, 4.0
GAIN = 1.05  # a step that brings less than this over the best one before brings nothing
KNEE = 0.95


@dataclass(frozen=True, slots=True)
class Step:
    users: int
    tokens_per_s: float


@dataclass(slots=True)
class Climb:
    """1, 2, 4, … `most` users, `step_s` each; over after two steps in turn that brought nothing.

    A step's rate leaves out its first quarter, in which the requests of the step before still end.
    """

    most: int
    step_s: float
    users: int = 1
    steps: list[Step] = field(default_factory=list)
    _began_s: float = 0.0
    _mark: tuple[float, int] | None = None

    def at(self, at_s: float, tokens: int) -> int | None:
        """How many users there should be now, `tokens` having been generated; None at the end."""
        into_s = at_s - self._began_s
        if self._mark is None and into_s >= self.step_s / 4:
            self._mark = (at_s, tokens)
        if into_s < self.step_s or self._mark is None:
            return self.users
        marked_s, marked = self._mark
        if at_s > marked_s:
            self.steps.append(Step(self.users, (tokens - marked) / (at_s - marked_s)))
        if self.users >= self.most or self.saturated:
            return None
        self.users, self._began_s, self._mark = min(2 * self.users, self.most), at_s, None
        return self.users

    @property
    def saturated(self) -> bool:
        if len(self.steps) < 3:
            return False
        best = max(step.tokens_per_s for step in self.steps[:-2])
        return all(step.tokens_per_s < GAIN * best for step in self.steps[-2:])

    def knee(self) -> Step | None:
        """The fewest users with which nearly the most tokens came."""
        best = max((step.tokens_per_s for step in self.steps), default=0.0)
        return next((step for step in self.steps if step.tokens_per_s >= KNEE * best), None)


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

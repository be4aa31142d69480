"""Decides how many users a ramp has at each moment, and finds its knee. Imports nothing of Locust."""

from dataclasses import dataclass, field

GAIN = 1.05  # a step must bring so much more than the best one before it
KNEE = 0.95  # of the highest rate


@dataclass(frozen=True, slots=True)
class Step:
    """Holds the rate that a number of users reached."""

    users: int
    tokens_per_s: float


@dataclass(slots=True)
class RampSchedule:
    """Steps through 1, 2, 4, … `most` users, `step_s` each, and ends after two steps without a gain.

    A step's rate leaves out its first quarter, in which requests of the step before still end.
    """

    most: int
    step_s: float
    users: int = 1
    steps: list[Step] = field(default_factory=list)
    _step_began_s: float = 0.0
    _mark: tuple[float, int] | None = None

    def users_at(self, at_s: float, tokens: int) -> int | None:
        """Returns the number of users at `at_s`, when `tokens` have been generated; None at the end."""
        in_step_s = at_s - self._step_began_s
        if self._mark is None and in_step_s >= self.step_s / 4:
            self._mark = (at_s, tokens)
        if in_step_s < self.step_s or self._mark is None:
            return self.users
        mark_s, mark_tokens = self._mark
        if at_s > mark_s:
            self.steps.append(Step(self.users, (tokens - mark_tokens) / (at_s - mark_s)))
        if self.users >= self.most or self.saturated:
            return None
        self.users, self._step_began_s, self._mark = min(2 * self.users, self.most), at_s, None
        return self.users

    @property
    def saturated(self) -> bool:
        """Tells whether the last two steps brought no gain."""
        if len(self.steps) < 3:
            return False
        best = max(step.tokens_per_s for step in self.steps[:-2])
        return all(step.tokens_per_s < GAIN * best for step in self.steps[-2:])

    def knee(self) -> Step | None:
        """Returns the step with the fewest users that reached KNEE of the highest rate."""
        best = max((step.tokens_per_s for step in self.steps), default=0.0)
        return next((step for step in self.steps if step.tokens_per_s >= KNEE * best), None)

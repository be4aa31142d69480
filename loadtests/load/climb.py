"""How a ramp climbs, and where its knee is. Knows nothing of Locust."""

from dataclasses import dataclass, field

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

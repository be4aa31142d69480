"""Lists the scenarios. Imports nothing of Locust, which patches the process that imports it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScenarioInfo:
    """Describes a scenario.

    A run lasts `duration_s` unless the caller says otherwise. A service that is started for it gets
    `adapters` adapters.
    """

    about: str
    duration_s: int | None = 60
    adapters: int = 4


SCENARIOS = {
    "steady": ScenarioInfo("constant users, each with one stream after the other"),
    "burst": ScenarioInfo("an eighth of the users always, all of them at once every 15 seconds"),
    "ramp": ScenarioInfo("1, 2, 4, … users until more of them bring no more tokens", duration_s=None),
    "churn": ScenarioInfo("more adapters than slots, chosen by Zipf's law", adapters=24),
    "neighbour": ScenarioInfo("one tenant floods after a third of the time; what does another notice?"),
    "soak": ScenarioInfo("mixed traffic for long; is the end like the beginning?", duration_s=1800),
    "mixed": ScenarioInfo("chat and text completion, whole and streamed, and clients that leave"),
}

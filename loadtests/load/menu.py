"""What scenarios there are. Imports nothing of Locust, which patches the process that imports it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """A scenario: `duration_s` unless told otherwise, `adapters` on a service of its own."""

    about: str
    duration_s: int | None = 60
    adapters: int = 4


MENU = {
    "steady": Entry("constant users, each with one stream after the other"),
    "burst": Entry("an eighth of the users always, all of them at once every 15 seconds"),
    "ramp": Entry("1, 2, 4, … users until more of them bring no more tokens", duration_s=None),
    "churn": Entry("more adapters than slots, chosen by Zipf's law", adapters=24),
    "neighbour": Entry("one tenant floods after a third of the time; what does another notice?"),
    "soak": Entry("mixed traffic for long; is the end like the beginning?", duration_s=1800),
    "mixed": Entry("chat and text completion, whole and streamed, and clients that leave"),
}

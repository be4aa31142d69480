"""The scenarios, one a module: its users, and what it finds out besides the tables."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from locust import LoadTestShape, User

from loadtests.load.menu import MENU
from loadtests.load.tally import Tally
from loadtests.load.target import Target, TargetError

SCENARIO_VARIABLE = "LOADTEST_SCENARIO"


def _nothing(_: Tally) -> dict[str, Any]:
    return {}


def _suits(_: Target) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Scenario:
    """`users` and `shape` are what Locust runs; `findings` are figures that only this scenario has.

    `check` raises TargetError for a target that does not do for it.
    """

    name: str
    about: str
    duration_s: int | None
    users: tuple[type[User], ...]
    shape: type[LoadTestShape] | None = None
    findings: Callable[[Tally], dict[str, Any]] = field(default=_nothing)
    check: Callable[[Target], None] = field(default=_suits)


def scenario_of(name: str) -> Scenario:
    """Raises TargetError for a name that is not on the menu."""
    if name not in MENU:
        raise TargetError(f"There is no scenario '{name}': {SCENARIO_VARIABLE} is one of {', '.join(MENU)}.")
    module, entry = import_module(f"{__name__}.{name}"), MENU[name]
    return Scenario(
        name,
        entry.about,
        entry.duration_s,
        module.USERS,
        getattr(module, "SHAPE", None),
        getattr(module, "findings", _nothing),
        getattr(module, "check", _suits),
    )

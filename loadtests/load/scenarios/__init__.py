"""Finds a scenario by name. Each has a module with its users and its findings beyond the tables."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from locust import LoadTestShape, User

from loadtests.load.measurements import Measurements
from loadtests.load.scenario_list import SCENARIOS
from loadtests.load.service_under_test import ServiceError, ServiceUnderTest

SCENARIO_VARIABLE = "LOADTEST_SCENARIO"


def _no_findings(_: Measurements) -> dict[str, Any]:
    return {}


def _no_check(_: ServiceUnderTest) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Scenario:
    """Joins a scenario's description with what Locust runs: `users` and `shape`.

    `findings` returns figures that only this scenario has. `check` raises ServiceError for a service that
    the scenario cannot run on.
    """

    name: str
    about: str
    duration_s: int | None
    users: tuple[type[User], ...]
    shape: type[LoadTestShape] | None = None
    findings: Callable[[Measurements], dict[str, Any]] = field(default=_no_findings)
    check: Callable[[ServiceUnderTest], None] = field(default=_no_check)


def find_scenario(name: str) -> Scenario:
    """Imports the scenario's module. Raises ServiceError for an unknown name."""
    if name not in SCENARIOS:
        raise ServiceError(
            f"There is no scenario '{name}': {SCENARIO_VARIABLE} is one of {', '.join(SCENARIOS)}."
        )
    module, info = import_module(f"{__name__}.{name}"), SCENARIOS[name]
    return Scenario(
        name,
        info.about,
        info.duration_s,
        module.USERS,
        getattr(module, "SHAPE", None),
        getattr(module, "findings", _no_findings),
        getattr(module, "check", _no_check),
    )

"""Gives Locust the users of one scenario; each run ends with a check of the bill. See docs/loadtests.md.

    make loadtest SCENARIO=steady USERS=16
    LOADTEST_SCENARIO=steady LOADTEST_KEY=bsk-… .venv/bin/python -m locust -f loadtests/locustfile.py --host http://…

Locust finds users and shapes among a locustfile's names, so the chosen scenario's are put there.
"""

import logging
import os
import sys
from typing import Any

import gevent
from locust import events

from loadtests.load.run import LoadRun
from loadtests.load.scenarios import SCENARIO_VARIABLE, find_scenario
from loadtests.load.service_under_test import ServiceError, find_service

STOP_TIMEOUT_S = 60  # for requests that still run at the end


def _refuse(error: ServiceError) -> None:
    print(error, file=sys.stderr)  # noqa: T201
    sys.exit(2)


try:
    scenario = find_scenario(os.environ.get(SCENARIO_VARIABLE, "steady"))
except ServiceError as error:
    _refuse(error)
globals().update({kind.__name__: kind for kind in (*scenario.users, scenario.shape) if kind is not None})


@events.init_command_line_parser.add_listener
def _defaults(parser: Any) -> None:
    """Keeps Locust's page on loopback. By default it listens on every interface."""
    parser.set_defaults(web_host="127.0.0.1", stop_timeout=STOP_TIMEOUT_S)


@events.init.add_listener
def _init(environment: Any, **_: Any) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each request of the billing check
    try:
        environment.loadtest = LoadRun(environment, scenario, find_service(os.environ, environment.host))
    except ServiceError as error:
        _refuse(error)
    # The event loop's clock stood still during the imports. A run would end so many seconds too early.
    gevent.get_hub().loop.update_now()

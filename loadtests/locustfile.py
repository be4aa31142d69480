"""Load scenarios for Locust, by name; each run ends with a reconciliation. See docs/loadtests.md.

    make loadtest SCENARIO=steady USERS=16
    LOADTEST_SCENARIO=steady LOADTEST_KEY=bsk-… .venv/bin/python -m locust -f loadtests/locustfile.py --host http://…

Locust takes users and shapes from a locustfile's names, so the chosen scenario's are put there.
"""

import logging
import os
import sys
from typing import Any

from locust import events

from loadtests.load.scenarios import SCENARIO_VARIABLE, scenario_of
from loadtests.load.session import Session
from loadtests.load.target import TargetError, target_of

STOP_TIMEOUT_S = 60  # a request that is under way at the end is waited for


def _refuse(error: TargetError) -> None:
    print(error, file=sys.stderr)  # noqa: T201
    sys.exit(2)


try:
    scenario = scenario_of(os.environ.get(SCENARIO_VARIABLE, "steady"))
except TargetError as error:
    _refuse(error)
globals().update({made.__name__: made for made in (*scenario.users, scenario.shape) if made is not None})


@events.init_command_line_parser.add_listener
def _defaults(parser: Any) -> None:
    """Locust would show its page to the whole network."""
    parser.set_defaults(web_host="127.0.0.1", stop_timeout=STOP_TIMEOUT_S)


@events.init.add_listener
def _init(environment: Any, **_: Any) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each look at the books
    try:
        environment.loadtest = Session(environment, scenario, target_of(os.environ, environment.host))
    except TargetError as error:
        _refuse(error)

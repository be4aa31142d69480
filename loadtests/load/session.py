"""A run as Locust tells of it: begins with its start, is reconciled at its stop, decides the exit code."""

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import gevent
import psutil
from locust.env import Environment
from locust.runners import STATE_INIT, STATE_RUNNING, STATE_SPAWNING, DistributedRunner

from loadtests.load import report
from loadtests.load.books import Before, Books
from loadtests.load.client import Gaps
from loadtests.load.exchange import Exchange, Outcome
from loadtests.load.reconcile import FAILED, Difference, Verdict
from loadtests.load.scenarios import Scenario
from loadtests.load.tally import SLICE_S, Tally
from loadtests.load.target import Target

log = logging.getLogger(__name__)

RESULT_VARIABLE = "LOADTEST_RESULT"
_BILLED_AS = {Outcome.COMPLETE: "request", Outcome.LEFT: "left", Outcome.REFUSED: "refused"}


class Session:
    """What the users of one Locust process share. Their tally is of the current run, or the last one."""

    def __init__(self, environment: Environment, scenario: Scenario, target: Target) -> None:
        if isinstance(environment.runner, DistributedRunner):
            raise SystemExit(
                "These scenarios run in one Locust process: the reconciliation needs every request."
            )
        scenario.check(target)
        self.target, self.scenario = target, scenario
        self.tally = Tally()
        self.exit_code = 0
        self._environment = environment
        self._books = Books(target)
        self._before: Before | None = None
        self._numbers: Counter[str] = Counter()
        self._sampler: gevent.Greenlet | None = None
        self._runs = 0
        self._reports: list[dict[str, Any]] = []
        environment.events.test_start.add_listener(self._start)
        environment.events.test_stop.add_listener(self._stop)
        environment.events.quitting.add_listener(self._quitting)
        environment.events.quit.add_listener(self._quit)

    @property
    def duration_s(self) -> int:
        """How long the run will be, as far as anybody has said."""
        options = self._environment.parsed_options
        said = options.run_time if options is not None else None
        return int(said or self.scenario.duration_s or 60)

    @property
    def users(self) -> int:
        runner = self._environment.runner
        return 0 if runner is None else int(runner.target_user_count)

    def number(self, kind: str) -> int:
        """0, 1, 2, … for the users of one kind in the order in which they come."""
        self._numbers[kind] += 1
        return self._numbers[kind] - 1

    def record(self, exchange: Exchange, gaps: Gaps) -> None:
        """Into the tally, and into Locust's statistics.

        The request is an event of Locust's. TTFT and the gaps are rows beside it that do not count into its
        totals, or its curves would show a mean of requests and single tokens.
        """
        self.tally.add(exchange, gaps)
        events, entries = self._environment.events, self._environment.stats.entries
        if gaps.first_ms is not None:
            entries[exchange.row, "TTFT"].log(gaps.first_ms, 0)
        for ms in gaps.between_ms:
            entries[exchange.row, "ITL"].log(ms, 0)
        failed = exchange.outcome is Outcome.FAILED
        refused = exchange.outcome is Outcome.REFUSED
        events.request.fire(
            request_type=_BILLED_AS.get(exchange.outcome, "request"),
            name=f"{exchange.row} {exchange.code}" if refused else exchange.row,
            response_time=exchange.latency_ms,
            response_length=0,
            exception=report.ApiError(exchange.code or "unknown") if failed else None,
            context={"request_id": exchange.request_id},
        )

    def _start(self, **_: Any) -> None:
        self._numbers.clear()
        self._before = self._books.open()
        self.tally = Tally()
        self._sampler = gevent.spawn(self._sample)

    def _sample(self) -> None:
        while True:
            gevent.sleep(SLICE_S)
            self.tally.sample(self.users, _memory_mb(self.target.service_pid))

    def _stop(self, **_: Any) -> None:
        if self._sampler is not None:
            self._sampler.kill()
        self.tally.sample(self.users, _memory_mb(self.target.service_pid))
        elapsed_s = self.tally.elapsed_s
        verdict = self._reconcile()
        made = report.make(self.scenario, self.target, self.tally, verdict, elapsed_s)
        self._reports.append(made)
        self._runs += 1
        if path := os.environ.get(RESULT_VARIABLE):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(made, indent=1) + "\n")
        complete, failed = self.tally.count(Outcome.COMPLETE), self.tally.count(Outcome.FAILED)
        code = verdict.exit_code(complete=complete, failed=failed)
        self.exit_code = max(self.exit_code, code)
        for one in verdict.differences:
            log.error("%s: %s: should be %s, is %s", one.who, one.what, one.seen, one.billed)
        log.info("reconciliation: %s", "agrees" if verdict.agrees else "DIFFERS")
        if not _headless(self._environment):
            self._quit()

    def _reconcile(self) -> Verdict:
        if self._before is None:
            return Verdict(
                differences=[Difference("run", "its beginning", "known", "the books were not read")]
            )
        try:
            return self._books.close(self._before, self.tally.exchanges)
        except Exception as error:  # whatever it is: what could not be compared does not agree
            log.exception("the reconciliation failed")
            return Verdict(differences=[Difference("books", "reading them", "possible", repr(error))])
        finally:
            self._before = None

    def _quitting(self, **_: Any) -> None:
        """Locust reads the exit code before it stops a run that Ctrl-C has ended."""
        runner = self._environment.runner
        if runner is not None and runner.state in (STATE_INIT, STATE_SPAWNING, STATE_RUNNING):
            runner.stop()
        if not self._runs:
            self.exit_code = max(self.exit_code, FAILED)
        self._environment.process_exit_code = self.exit_code

    def _quit(self, **_: Any) -> None:
        """After Locust's own tables."""
        while self._reports:
            report.show(self._reports.pop(0))


def _headless(environment: Environment) -> bool:
    return environment.parsed_options is None or bool(environment.parsed_options.headless)


def _memory_mb(pid: int | None) -> int | None:
    """Resident memory of the service's processes together; pages that they share count for each."""
    if pid is None:
        return None
    total = 0
    try:
        family = [root := psutil.Process(pid), *root.children(recursive=True)]
    except psutil.Error:
        return None
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total // 2**20

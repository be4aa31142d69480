"""Follows Locust's runs: takes a baseline at the start, checks the bill at the stop, sets the exit code."""

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

from loadtests.load import run_report
from loadtests.load.bill_comparison import FAILED, BillMismatch, Verdict
from loadtests.load.billing_check import Baseline, BillingCheck
from loadtests.load.client import StreamTiming
from loadtests.load.measurements import SLICE_S, Measurements
from loadtests.load.request_record import Outcome, RequestRecord
from loadtests.load.scenarios import Scenario
from loadtests.load.service_under_test import ServiceUnderTest

log = logging.getLogger(__name__)

RESULT_VARIABLE = "LOADTEST_RESULT"
_LOCUST_TYPES = {Outcome.COMPLETE: "request", Outcome.LEFT: "left", Outcome.REFUSED: "refused"}


class LoadRun:
    """Holds what the users of one Locust process share: the service, and the measurements of the last run."""

    def __init__(self, environment: Environment, scenario: Scenario, service: ServiceUnderTest) -> None:
        if isinstance(environment.runner, DistributedRunner):
            raise SystemExit(
                "These scenarios run in one Locust process: the reconciliation needs every request."
            )
        scenario.check(service)
        self.service, self.scenario = service, scenario
        self.measurements = Measurements()
        self.exit_code = 0
        self._environment = environment
        self._billing_check = BillingCheck(service)
        self._baseline: Baseline | None = None
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
        """Gives the length of the run as far as it is known."""
        options = self._environment.parsed_options
        run_time = options.run_time if options is not None else None
        return int(run_time or self.scenario.duration_s or 60)

    @property
    def users(self) -> int:
        runner = self._environment.runner
        return 0 if runner is None else int(runner.target_user_count)

    def number(self, kind: str) -> int:
        """Numbers the users of one kind 0, 1, 2, … in the order of their start."""
        self._numbers[kind] += 1
        return self._numbers[kind] - 1

    def record(self, record: RequestRecord, timing: StreamTiming) -> None:
        """Adds a request to the measurements and to Locust's statistics.

        Locust gets the request as an event. TTFT and gaps are rows that do not count into Locust's totals;
        otherwise its curves would show a mean over requests and single tokens.
        """
        self.measurements.add(record, timing)
        events, entries = self._environment.events, self._environment.stats.entries
        if timing.first_ms is not None:
            entries[record.row, "TTFT"].log(timing.first_ms, 0)
        for ms in timing.between_ms:
            entries[record.row, "ITL"].log(ms, 0)
        failed = record.outcome is Outcome.FAILED
        refused = record.outcome is Outcome.REFUSED
        events.request.fire(
            request_type=_LOCUST_TYPES.get(record.outcome, "request"),
            name=f"{record.row} {record.code}" if refused else record.row,
            response_time=record.latency_ms,
            response_length=0,
            exception=run_report.ApiError(record.code or "unknown") if failed else None,
            context={"request_id": record.request_id},
        )

    def _start(self, **_: Any) -> None:
        self._numbers.clear()
        self._baseline = self._billing_check.begin()
        self.measurements = Measurements()
        self._sampler = gevent.spawn(self._sample)

    def _sample(self) -> None:
        while True:
            gevent.sleep(SLICE_S)
            self.measurements.sample(self.users, _memory_mb(self.service.pid))

    def _stop(self, **_: Any) -> None:
        if self._sampler is not None:
            self._sampler.kill()
        self.measurements.sample(self.users, _memory_mb(self.service.pid))
        elapsed_s = self.measurements.elapsed_s
        verdict = self._reconcile()
        report = run_report.build_report(self.scenario, self.service, self.measurements, verdict, elapsed_s)
        self._reports.append(report)
        self._runs += 1
        if path := os.environ.get(RESULT_VARIABLE):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(report, indent=1) + "\n")
        complete, failed = self.measurements.count(Outcome.COMPLETE), self.measurements.count(Outcome.FAILED)
        code = verdict.exit_code(complete=complete, failed=failed)
        self.exit_code = max(self.exit_code, code)
        for mismatch in verdict.mismatches:
            log.error(
                "%s: %s: should be %s, is %s",
                mismatch.subject,
                mismatch.quantity,
                mismatch.expected,
                mismatch.billed,
            )
        log.info("reconciliation: %s", "agrees" if verdict.agrees else "DIFFERS")
        if not _headless(self._environment):
            self._quit()

    def _reconcile(self) -> Verdict:
        if self._baseline is None:
            return Verdict(
                mismatches=[BillMismatch("run", "its beginning", "known", "the books were not read")]
            )
        try:
            return self._billing_check.finish(self._baseline, self.measurements.records)
        except Exception as error:  # of any kind: what could not be compared does not agree
            log.exception("the reconciliation failed")
            return Verdict(mismatches=[BillMismatch("books", "reading them", "possible", repr(error))])
        finally:
            self._baseline = None

    def _quitting(self, **_: Any) -> None:
        """Sets the exit code. Locust reads it before it stops a run that Ctrl-C has ended."""
        runner = self._environment.runner
        if runner is not None and runner.state in (STATE_INIT, STATE_SPAWNING, STATE_RUNNING):
            runner.stop()
        if not self._runs:
            self.exit_code = max(self.exit_code, FAILED)
        self._environment.process_exit_code = self.exit_code

    def _quit(self, **_: Any) -> None:
        """Prints the reports after Locust's own tables."""
        while self._reports:
            run_report.print_report(self._reports.pop(0))


def _headless(environment: Environment) -> bool:
    return environment.parsed_options is None or bool(environment.parsed_options.headless)


def _memory_mb(pid: int | None) -> int | None:
    """Returns the resident memory of all the service's processes; pages that they share count for each."""
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

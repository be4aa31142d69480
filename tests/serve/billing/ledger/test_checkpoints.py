"""Tests the checkpoint files of gateways: what survives the process, and who may read it."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest

from serve.billing.ledger import checkpoints as checkpoints_module
from serve.billing.ledger.checkpoints import (
    FLUSH_S,
    Checkpoint,
    RequestEnd,
    UsageCheckpoints,
    checkpoint_files,
    lock_checkpoints,
    merge,
    remove_checkpoints,
)
from serve.billing.metering.events import UsageEvent, UsageStatus
from serve.billing.metering.terms import BillingTerms, RequestUsage
from serve.billing.pricing.plans import Tokens
from tests.support.constants import NOON, RATES
from tests.support.disks import SIZE_BYTES, small_disk
from tests.support.waiting import wait_until

SALE = BillingTerms("acme", "key", None, "tiny", "tiny", None, 1, RATES, 1, "default")


def served(completion: int, attempt: int = 1) -> RequestUsage:
    return RequestUsage("r", f"boot-{attempt}", Tokens(10, 4, completion), attempt)


def event(request_id: str, completion: int) -> UsageEvent:
    return SALE.event(
        request_id, served(completion), UsageStatus.COMPLETE, "stop", ttft_ms=1, latency_ms=2, at=NOON
    )


END = RequestEnd(UsageStatus.COMPLETE, "stop", 1, 2, NOON)


def left(folder: Path) -> dict[str, Checkpoint]:
    """Return the records of the only checkpoint file in `folder`, whose gateway is dead."""
    (path,) = checkpoint_files(folder)
    with lock_checkpoints(path) as records:
        assert records is not None
        return records


@contextmanager
def other_process(script: str, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run `script` with its `folder` until it ends or the context does."""
    head = "import sys, time\nfrom pathlib import Path\nfrom serve.billing.ledger.checkpoints import *\n"
    head += "from serve.billing.metering.terms import RequestUsage\n"
    head += "from serve.billing.pricing.plans import Tokens\n"
    head += "folder = Path(sys.argv[1])\n"
    command = [sys.executable, "-c", head + script, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_last_count_of_a_request_is_on_disk_within_a_flush(tmp_path: Path) -> None:
    with closing(UsageCheckpoints(tmp_path)) as checkpoints:
        for count in range(1, 50):
            checkpoints.track("req_1", partial(served, count))
        (path,) = checkpoint_files(tmp_path)
        started_s = time.monotonic()
        wait_until(lambda: b'"completion":49' in path.read_bytes(), 10, 0.005)
        assert time.monotonic() - started_s < 20 * FLUSH_S  # on a machine with nothing else to do, one
    assert left(tmp_path) == {"req_1": Checkpoint(served(49))}


def test_an_end_is_in_the_file_when_it_has_been_noted(tmp_path: Path) -> None:
    with closing(UsageCheckpoints(tmp_path)) as checkpoints:
        checkpoints.note_end(event("req_1", 7))
        (path,) = checkpoint_files(tmp_path)
        assert b'"end"' in path.read_bytes()
    assert left(tmp_path) == {"req_1": Checkpoint(served(7), END)}


def test_nothing_is_left_of_a_gateway_that_ended_with_nothing_open(tmp_path: Path) -> None:
    with closing(UsageCheckpoints(tmp_path)) as checkpoints:
        checkpoints.track("req_1", partial(served, 1))
        checkpoints.note_end(event("req_1", 2))
        checkpoints.forget("req_1")
    assert list(tmp_path.iterdir()) == []


def test_of_many_records_the_highest_counts_hold_in_whatever_order_they_are_read(tmp_path: Path) -> None:
    records = [
        Checkpoint(served(3)),
        Checkpoint(served(9)),
        Checkpoint(served(5), END),
        Checkpoint(served(9)),
    ]
    for order in permutations(records):
        found = order[0]
        for one in order[1:]:
            found = merge(found, one)
        assert found == Checkpoint(served(9), END)


def test_a_later_attempts_counts_replace_those_of_the_one_before() -> None:
    first, second = Checkpoint(served(50, attempt=1)), Checkpoint(served(2, attempt=2))
    assert merge(first, second) == merge(second, first) == second


def test_lines_count_once_however_often_they_are_there(tmp_path: Path) -> None:
    with closing(UsageCheckpoints(tmp_path)) as checkpoints:
        checkpoints.track("req_1", partial(served, 8))
    (path,) = checkpoint_files(tmp_path)
    path.write_bytes(path.read_bytes() * 3)
    assert left(tmp_path) == {"req_1": Checkpoint(served(8))}


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path: Path) -> None:
    with closing(UsageCheckpoints(tmp_path)) as checkpoints:
        checkpoints.track("req_1", partial(served, 8))
        checkpoints.flush()
        checkpoints.track("req_2", partial(served, 9))
    (path,) = checkpoint_files(tmp_path)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        found = left(tmp_path)
        assert found.items() <= {"req_1": Checkpoint(served(8)), "req_2": Checkpoint(served(9))}.items()
        assert ("req_1" in found, "req_2" in found) == (size >= first - 1, size >= len(whole) - 1)


def test_the_lock_ends_with_the_process_however_that_ends(tmp_path: Path) -> None:
    script = (
        "checkpoints = UsageCheckpoints(folder)\n"
        "checkpoints.track('req_1', lambda: RequestUsage('r', 'boot-1', Tokens(10, 4, 6)))\n"
        "checkpoints.flush()\nprint('ready', flush=True)\ntime.sleep(600)\n"
    )
    with other_process(script, tmp_path) as gateway:
        assert read_line(gateway) == "ready"
        (path,) = checkpoint_files(tmp_path)
        with lock_checkpoints(path) as records:
            assert records is None
        gateway.kill()  # SIGKILL
        gateway.wait(10)
        with lock_checkpoints(path) as records:
            assert records == {"req_1": Checkpoint(served(6))}
            with lock_checkpoints(path) as again:
                assert again is None  # another steward's, meanwhile


def test_a_checkpoint_file_begins_anew_when_it_has_grown_and_is_never_free_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process polls all the time, as a steward does; it never reads a live gateway's file."""
    monkeypatch.setattr(checkpoints_module, "SIZE_BYTES_MAX", 2000)
    script = (
        "print('ready', flush=True)\ngot = looked = 0\n"
        "while not (folder / 'stop').exists():\n"
        "    for path in checkpoint_files(folder):\n"
        "        with lock_checkpoints(path) as records:\n"
        "            looked += 1\n            got += records is not None\n"
        "print(looked > 0, got, flush=True)\n"
    )
    with other_process(script, tmp_path) as steward:
        assert read_line(steward) == "ready"
        with closing(UsageCheckpoints(tmp_path)) as checkpoints:
            inodes, size_max = set(), 0
            for count in range(1, 400):
                checkpoints.track("req_open", partial(served, count))
                checkpoints.note_end(event(f"req_{count}", count))
                checkpoints.forget(f"req_{count}")
                checkpoints.flush()
                (path,) = checkpoint_files(tmp_path)
                inodes.add(path.stat().st_ino)
                size_max = max(size_max, path.stat().st_size)
            assert len(inodes) > 1
            assert size_max < 2 * 2000
            # Gateways that come, too, have theirs locked before anybody can find it.
            for _ in range(50):
                UsageCheckpoints(tmp_path).close()
            (tmp_path / "stop").touch()
            assert read_line(steward) == "True 0"
    found = left(tmp_path)
    assert found["req_open"] == Checkpoint(served(399))
    assert len(found) < 10


def test_what_a_full_disk_refuses_is_told_and_written_once_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        failures: list[None] = []
        with closing(UsageCheckpoints(disk, on_failure=lambda: failures.append(None))) as checkpoints:
            checkpoints.track("req_before", partial(served, 1))
            checkpoints.flush()
            wide, count = "x" * 2000, 0
            while not failures:
                assert count * 2000 < 2 * SIZE_BYTES, "the disk is never full"
                checkpoints.note_end(replace(event(f"req_{count}", count), finish_reason=wide))
                count += 1
            for refused in range(count):
                if refused != count - 1:
                    checkpoints.forget(f"req_{refused}")
            (path,) = checkpoint_files(disk)
            assert path.read_bytes().endswith(b"\n")  # the next line is not spoilt
            told = len(failures)
            checkpoints.flush()
            assert len(failures) > told  # it is tried again, and told again

            path.write_bytes(b"")  # there is room again
            wait_until(lambda: f"req_{count - 1}".encode() in path.read_bytes(), 10)
            found = {line.split(b'"')[3] for line in path.read_bytes().splitlines()}
            assert found == {f"req_{count - 1}".encode()}


def test_a_disk_that_is_full_when_the_file_has_grown_does_not_end_its_growing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compaction is tried again each time, and no failed try leaves a file open or locked."""
    monkeypatch.setattr(checkpoints_module, "SIZE_BYTES_MAX", 1000)
    with small_disk(tmp_path / "disk") as disk:
        failures: list[None] = []
        with closing(UsageCheckpoints(disk, on_failure=lambda: failures.append(None))) as checkpoints:
            for number in range(80):
                reason = "x" * 2000
                ended = replace(event(f"req_{number}", 1), finish_reason=reason, created_at=NOON)
                checkpoints.note_end(
                    ended
                )  # all of them open: two such files do not go into the disk together
            if not disk.is_mount():
                pytest.skip("files are bounded here, not the disk")
            told = len(failures)
            wait_until(lambda: len(failures) > told + 3, 10)
            (path,) = checkpoint_files(disk)
            for number in range(80):
                checkpoints.forget(f"req_{number}")
            checkpoints.track("req_last", partial(served, 5))
            wait_until(lambda: path.stat().st_size < 1000 and b"req_last" in path.read_bytes(), 10)
        assert left(disk) == {"req_last": Checkpoint(served(5))}


def test_a_checkpoint_file_that_is_removed_takes_with_it_what_was_begun_anew(tmp_path: Path) -> None:
    with closing(UsageCheckpoints(tmp_path)) as checkpoints:
        checkpoints.track("req_1", partial(served, 1))
    (path,) = checkpoint_files(tmp_path)
    path.with_suffix(".new").touch()  # its gateway died while it began anew
    with lock_checkpoints(path):
        remove_checkpoints(path)
    assert list(tmp_path.iterdir()) == []


def test_times_are_kept_to_the_microsecond_and_in_utc(tmp_path: Path) -> None:
    at = NOON + timedelta(microseconds=123456)
    with closing(UsageCheckpoints(tmp_path)) as checkpoints:
        checkpoints.note_end(replace(event("req_1", 7), created_at=at))
    end = left(tmp_path)["req_1"].end
    assert end is not None
    assert end.at == at

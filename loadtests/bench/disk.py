"""Measures beside the load how long the disk takes for an fsync; a hold and a settlement wait for one."""

import os
import tempfile
import threading
import time
from types import TracebackType

PAGE = bytes(4096)
PAUSE_S = 0.1


class DiskProbe:
    """Writes a page and fsyncs it ten times a second, on the disk that the service under test writes to.

    It is a thread of the load generator: fsync(2) waits without the interpreter's lock.
    """

    def __enter__(self) -> "DiskProbe":
        self._file = tempfile.TemporaryFile(prefix="bespoke-bench-")
        self._waits_s: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._probe, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._file.close()

    def _probe(self) -> None:
        while not self._ended.wait(PAUSE_S):
            begun_s = time.perf_counter()
            os.pwrite(self._file.fileno(), PAGE, 0)
            os.fsync(self._file.fileno())
            self._waits_s.append(time.perf_counter() - begun_s)

    def worst_ms(self) -> float:
        """Returns the longest wait since the last call, 0 if there was none."""
        waits_s, self._waits_s = self._waits_s, []
        return round(1000 * max(waits_s, default=0.0), 2)

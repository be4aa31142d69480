"""A disk that is soon full: a tmpfs of a few kilobytes, or a bound on how large this process's files grow."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE_BYTES = 256 << 10


@contextmanager
def small_disk(folder: Path, size_bytes: int = SIZE_BYTES) -> Iterator[Path]:
    """A folder into which `size_bytes` go, or, where tmpfs may not be mounted, files of this size."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
        try:
            yield folder
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)

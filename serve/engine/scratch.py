"""A process's own folder for packed adapters: in memory where the machine has room there, and swept up later.

A process that is killed cannot clean up, so the next one does.
"""

import os
import shutil
import tempfile
from pathlib import Path

import psutil

_PREFIX = "bespoke-adapters-"
_SHARED_MEMORY = Path("/dev/shm")
_FREE_BYTES_MIN = 2 << 30


def make() -> Path:
    """A new folder that only this user can read. Sweeps first."""
    sweep()
    parent = Path(tempfile.gettempdir())
    # A file there is written eight times as fast as on a disk. Containers often have but 64 MB of it.
    if os.access(_SHARED_MEMORY, os.W_OK) and shutil.disk_usage(_SHARED_MEMORY).free >= _FREE_BYTES_MIN:
        parent = _SHARED_MEMORY
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))


def sweep() -> None:
    """Remove the folders of processes that are gone."""
    for parent in (_SHARED_MEMORY, Path(tempfile.gettempdir())):
        for folder in parent.glob(f"{_PREFIX}*"):
            pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)

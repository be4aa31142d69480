"""Checks directories of packed adapters: each process has its own, and none outlives it for long."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from serve.engine.adapters import cache


@pytest.fixture(autouse=True)
def parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Gives the test its own shared memory and disk."""
    memory, disk = tmp_path / "shm", tmp_path / "tmp"
    for parent in (memory, disk):
        parent.mkdir()
    monkeypatch.setattr(cache, "_SHARED_MEMORY", memory)
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    return memory, disk


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    return process.pid


def folder(parent: Path, pid: int | str) -> Path:
    directory = parent / f"bespoke-adapters-{pid}-abc"
    directory.mkdir()
    (directory / "weights.bin").write_bytes(b"x")
    return directory


def test_folders_of_dead_processes_go_and_those_of_living_ones_stay(parents: tuple[Path, Path]) -> None:
    dead = dead_pid()
    gone = [folder(parent, dead) for parent in parents]
    living = [folder(parent, pid) for parent in parents for pid in (os.getpid(), os.getppid())]
    others = [folder(parents[0], "nobody"), parents[0] / f"other-{dead}-abc"]
    others[1].mkdir()
    cache.sweep_directories()
    assert not any(path.exists() for path in gone)
    assert all((path / "weights.bin").exists() for path in living)
    assert all(path.exists() for path in others), "what is not its own is not its business"


def test_a_new_folder_is_this_processs_own_and_comes_after_a_sweep(parents: tuple[Path, Path]) -> None:
    gone = folder(parents[1], dead_pid())
    directory = cache.make_directory()
    assert not gone.exists()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    cache.sweep_directories()
    assert directory.exists()
    assert cache.make_directory() != directory


def test_without_room_in_memory_the_folder_is_on_disk(
    parents: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, disk = parents
    monkeypatch.setattr(cache, "_FREE_BYTES_MIN", 0)
    assert cache.make_directory().parent == memory
    monkeypatch.setattr(cache, "_FREE_BYTES_MIN", 1 << 62)
    assert cache.make_directory().parent == disk

"""Bases on disk: their directories, one builder at a time, and publishing by rename.

Unfinished and refused bases have names that begin with a dot, which no published base can have.
"""

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize.card import CARD, NAME_LENGTH_MAX, NAME_PATTERN, REPORT, verify
from quantize.errors import NameInvalid, QuantizeError


def base_dir(bases_root: Path, name: str) -> Path:
    """Returns the directory of the base of that name. Raises NameInvalid for all that could be a path."""
    if len(name) > NAME_LENGTH_MAX or re.fullmatch(NAME_PATTERN, name) is None:
        raise NameInvalid(name)
    return bases_root / name


def rejected_dir(bases_root: Path, name: str) -> Path:
    """Returns the directory for the card and report, never the weights, of a base that failed its gate."""
    return bases_root / ".rejected" / base_dir(bases_root, name).name


def is_current(directory: Path, recipe_sha256: str) -> bool:
    """Returns whether a published base is intact and was made by exactly this recipe."""
    try:
        return verify(directory).recipe_sha256 == recipe_sha256
    except QuantizeError:
        return False


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Waits until no other process builds this base. The kernel releases the lock of a process that dies."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{directory.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yields an empty draft directory beside `directory`, and renames it into place if the block succeeds.

    Call it under `locked`, because it removes the leftovers of a killed builder. Nothing is fsynced: a file
    torn by a power cut does not match its card, so it is refused and built again.
    """
    draft = directory.with_name(f".{directory.name}.draft")
    retired = directory.with_name(f".{directory.name}.retired")
    for leftover in (draft, retired):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        for path in draft.iterdir():
            path.chmod(0o644)  # safetensors writes 0600; engines may run as another user
        if directory.exists():
            directory.rename(retired)
        draft.rename(directory)
    finally:
        for leftover in (draft, retired):
            shutil.rmtree(leftover, ignore_errors=True)


def keep_rejected(draft: Path, bases_root: Path, name: str) -> Path:
    """Copies the card and the report of a draft that failed its gate into `.rejected/`."""
    rejected = rejected_dir(bases_root, name)
    rejected.mkdir(parents=True, exist_ok=True)
    for file in (CARD, REPORT):
        shutil.copyfile(draft / file, rejected / file)
    return rejected

"""Makes virtual environments for peers that must not share ours, once per lock file."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(
    name: str, *, folder: Path = Path(__file__).parent, without_wheels: Sequence[str] = ()
) -> Path:
    """Returns the `bin` directory of an environment with exactly `requirements-NAME.txt`; makes it if needed.

    The file is in `folder`. `without_wheels` names packages that exist only as source and are built.

    pip installs only wheels with the hashes of the lock, so no code of a package runs before its hash was
    verified. The environment lives in `.cache/`; another lock makes another environment.
    """
    lock = folder / f"requirements-{name}.txt"
    lock_hash = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
    home = ROOT / ".cache" / folder.name / f"{name}-{lock_hash}"
    ready = home / ".ready"
    if not ready.exists():
        shutil.rmtree(home, ignore_errors=True)  # an interrupted installation
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        install = [
            str(home / "bin" / "python"),
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
        ]
        install += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", str(lock)]
        install += [argument for package in without_wheels for argument in ("--no-binary", package)]
        completed = subprocess.run(install, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if completed.returncode:
            raise RuntimeError(f"The environment of {name} could not be made:\n{completed.stdout[-4000:]}")
        ready.touch()
    return home / "bin"


def isolated_variables(scratch: Path) -> dict[str, str]:
    """Returns variables for a process that must see none of our keys, settings and proxies."""
    passed_on = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    return passed_on | {"HOME": str(scratch), "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}

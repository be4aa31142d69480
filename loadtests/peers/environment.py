"""Throw-away environments for peers that must not share ours, made once from a lock with hashes."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(name: str) -> Path:
    """The `bin` directory of a virtual environment with exactly `requirements-NAME.txt`; made if not there.

    pip takes only files with the hashes of the lock, and only wheels: nothing of a package runs before its
    hash has been verified. Lives in `.cache/peers/`; another lock makes another environment.
    """
    lock = Path(__file__).parent / f"requirements-{name}.txt"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
    home = ROOT / ".cache" / "peers" / f"{name}-{digest}"
    ready = home / ".ready"
    if not ready.exists():
        shutil.rmtree(home, ignore_errors=True)  # one that was broken off
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
        done = subprocess.run(install, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"The environment of {name} could not be made:\n{done.stdout[-4000:]}")
        ready.touch()
    return home / "bin"


def bare_variables(scratch: Path) -> dict[str, str]:
    """The environment of a process that is to know nothing of ours: no keys, no settings, no proxies."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    return kept | {"HOME": str(scratch), "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}

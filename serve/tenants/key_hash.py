"""Keys as secrets: made at random, shown once, stored as a keyed hash.

The store keeps HMAC-SHA-256(server secret, key), so a stolen database neither yields keys nor lets
anyone test guesses without the secret (RFC 2104; keys carry 256 bits of randomness, so a slow password
hash would add nothing). Look-ups are by digest: their time tells nothing about how close a guess was.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from serve.errors import Unauthenticated

KEY_LENGTH_MAX = 128


def server_secret(home: Path) -> bytes:
    """The secret that hashes keys, created on first use, readable by its owner only."""
    path = home / "secret"
    home.mkdir(parents=True, exist_ok=True)
    staged = home / f".secret-{os.getpid()}-{secrets.token_hex(4)}"
    if not path.exists():
        with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_hex(32).encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(staged, path)  # fails if another process was first; its secret is the one
        except FileExistsError:
            pass
        finally:
            staged.unlink()
    return path.read_bytes()


class KeyHasher:
    """Makes keys that begin with `prefix`, and knows them again by their digest."""

    def __init__(self, prefix: str, server_secret: bytes) -> None:
        self._prefix = prefix
        self._server_secret = server_secret

    def new(self) -> tuple[str, dict[str, str]]:
        """A new key, and the columns that remember it."""
        key = self._prefix + secrets.token_urlsafe(32)
        return key, {"digest": self.digest(key), "hint": key[-4:]}

    def digest(self, key: str) -> str:
        """Raises Unauthenticated for what cannot be one of these keys."""
        if not key.startswith(self._prefix) or len(key) > KEY_LENGTH_MAX:
            raise Unauthenticated()
        return hmac.new(self._server_secret, key.encode(), hashlib.sha256).hexdigest()

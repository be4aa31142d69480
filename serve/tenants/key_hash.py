"""Creates API keys and hashes them. A key is random, shown once, and stored as a keyed hash.

The store keeps HMAC-SHA-256(server secret, key) (RFC 2104). A stolen database yields no keys, and nobody
can test guesses without the secret. Keys carry 256 bits of randomness, so a slow password hash would add
nothing. Look-ups are by digest, so their time does not reveal how close a guess was.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from serve.errors import Unauthenticated

KEY_LENGTH_MAX = 128


def server_secret(home: Path) -> bytes:
    """Return the secret that hashes keys. It is created on first use, readable only by its owner."""
    path = home / "secret"
    home.mkdir(parents=True, exist_ok=True)
    staged = home / f".secret-{os.getpid()}-{secrets.token_hex(4)}"
    if not path.exists():
        with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_hex(32).encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(staged, path)  # fails if another process was first; then its secret is used
        except FileExistsError:
            pass
        finally:
            staged.unlink()
    return path.read_bytes()


class KeyHasher:
    """Creates keys that begin with `prefix`, and computes their digests."""

    def __init__(self, prefix: str, server_secret: bytes) -> None:
        self._prefix = prefix
        self._server_secret = server_secret

    def new(self) -> tuple[str, dict[str, str]]:
        """Return a new key and its columns in the store."""
        key = self._prefix + secrets.token_urlsafe(32)
        return key, {"digest": self.digest(key), "hint": key[-4:]}

    def digest(self, key: str) -> str:
        """Return the key's digest. Raises Unauthenticated if it cannot be one of these keys."""
        if not key.startswith(self._prefix) or len(key) > KEY_LENGTH_MAX:
            raise Unauthenticated()
        return hmac.new(self._server_secret, key.encode(), hashlib.sha256).hexdigest()

#!/usr/bin/env bash
# Makes .venv with everything pinned by requirements.lock (versions and hashes), for `make setup`.
# uv does in 20 seconds what pip does in 5 minutes; if uv cannot (another kind of registry, say), pip does.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "setup: Python 3.11 is needed; set PYTHON=/path/to/python3.11" >&2
    exit 1
}

echo "setup: making .venv with $("$python" --version)"
rm -f .venv/.ready
"$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet --require-hashes -r scripts/uv.lock

# uv has settings of its own; give it the ones this machine has for pip.
setting() { "${pip[@]}" config get "global.$1" 2>/dev/null || true; }
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(setting find-links)}}
export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(setting index-url)}}
export SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-$(setting cert)}}
for name in UV_FIND_LINKS UV_DEFAULT_INDEX SSL_CERT_FILE; do [ -n "${!name}" ] || unset "$name"; done

echo "setup: installing $(grep -c == requirements.lock) pinned packages"
if ! .venv/bin/uv pip install --python .venv/bin/python --no-deps --require-hashes -r requirements.lock; then
    echo "setup: uv could not; trying pip, which takes some minutes"
    "${pip[@]}" install --no-deps --require-hashes -r requirements.lock || {
        echo "setup: if it was torch: 'torch==2.13.0+cpu' must be at hand, see README, Installing" >&2
        exit 1
    }
fi
"${pip[@]}" install --quiet --no-deps --no-build-isolation --editable .
touch .venv/.ready

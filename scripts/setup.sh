#!/usr/bin/env bash
# Makes .venv with everything pinned by requirements.lock (versions and hashes), for `make setup`.
# uv does in 20 seconds what pip does in 5 minutes; if uv cannot (another kind of registry, say), pip does.
set -euo pipefail
cd "$(dirname "$0")/.."

# A name on PATH is not yet a Python: a pyenv shim may have no version behind it, Debian's lacks ensurepip.
usable() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() {
    local name path names=${PYTHON:-python3.11 python3.12 python3.13 python3}
    for name in $names; do
        while read -r path; do
            if usable "$path"; then
                echo "$path"
                return
            fi
        done < <(type -aP "$name")
    done
    echo "setup: Python 3.11, 3.12 or 3.13 is needed; looked for: $names" >&2
    echo "setup: it must run and make environments (Debian: python3-venv); make setup PYTHON=/path says where" >&2
    return 1
}

version() { "$1" -c 'import sys; print(*sys.version_info[:3], sep=".")' 2>/dev/null || true; }

python=$(find_python)
echo "setup: making .venv with Python $(version "$python")"
rm -f .venv/.ready
clear=()
[ "$(version .venv/bin/python)" = "$(version "$python")" ] || clear=(--clear)
"$python" -m venv "${clear[@]}" .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet --require-hashes -r scripts/uv.lock

# uv has settings of its own; give it the ones this machine has for pip.
setting() { "${pip[@]}" config get "global.$1" 2>/dev/null || true; }
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(setting find-links)}}
export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(setting index-url)}}
export SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-$(setting cert)}}
for name in UV_FIND_LINKS UV_DEFAULT_INDEX SSL_CERT_FILE; do [ -n "${!name}" ] || unset "$name"; done

pinned=(--no-deps --require-hashes -r requirements.lock)
uv_install() { .venv/bin/uv pip install --python .venv/bin/python "${pinned[@]}" "$@"; }

echo "setup: installing $(grep -c == requirements.lock) pinned packages"
# PyTorch publishes its CPU build on an index of its own, which uv knows. What is configured comes first.
uv_install || {
    echo "setup: not everything is where this machine looks; taking torch from PyTorch's own index"
    uv_install --torch-backend cpu
} || {
    echo "setup: uv could not; trying pip, which takes some minutes"
    "${pip[@]}" install "${pinned[@]}"
} || {
    echo "setup: could not install the packages above; if it was torch, see README, Installing" >&2
    exit 1
}
"${pip[@]}" install --quiet --no-deps --no-build-isolation --editable .
touch .venv/.ready

#!/usr/bin/env bash
# Resolves pyproject.toml anew into requirements.lock: names, versions and hashes, no addresses.
set -euo pipefail
cd "$(dirname "$0")/.."
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}}
export SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}}
.venv/bin/uv pip compile pyproject.toml --extra cpu --extra demo --extra dev --override scripts/overrides.txt \
    --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate \
    --python-platform x86_64-manylinux_2_28 --python .venv/bin/python --output-file requirements.lock "$@"
echo 'uv' | .venv/bin/uv pip compile - --generate-hashes --no-emit-index-url --no-header --no-annotate \
    --output-file scripts/uv.lock "$@"

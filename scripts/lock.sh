#!/usr/bin/env bash
# Resolves pyproject.toml anew into requirements.lock: names, versions and hashes, no addresses.
# One lock serves every Python that pyproject.toml allows, on Linux and x86-64.
set -euo pipefail
cd "$(dirname "$0")/.."
export SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}}
.venv/bin/uv pip compile pyproject.toml --extra cpu --extra demo --extra embeddings --extra dev \
    --override scripts/overrides.txt --universal --python-version 3.11 --no-emit-package torch --generate-hashes \
    --no-emit-index-url --no-emit-find-links --no-header --no-annotate --output-file requirements.lock "$@"
# For a new torch, first write its version and the hash of its CPU wheel for each Python there.
cat scripts/torch.lock >>requirements.lock
# The resolver repeats the environments of [tool.uv] on every line; another platform must fail, not skip all.
sed -i "s/ ; python_full_version < '3.14' .* \\\\$/ \\\\/" requirements.lock
echo 'uv' | .venv/bin/uv pip compile - --generate-hashes --no-emit-index-url --no-header --no-annotate \
    --output-file scripts/uv.lock "$@"

#!/usr/bin/env bash
# Resolves the suites' environments anew: names, versions and hashes, no addresses. Wheels only, but for the three
# small packages of lm-eval that have none (suites.py).
set -euo pipefail
cd "$(dirname "$0")/../.."
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}}
export SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}}

resolve() {
    local name=$1 packages=$2
    shift 2
    printf '%s\n' $packages | .venv/bin/uv pip compile - --generate-hashes --only-binary :all: "$@" --no-emit-index-url \
        --no-emit-find-links --no-header --no-annotate --python-platform x86_64-manylinux_2_28 --python-version 3.11 \
        --quiet --output-file "loadtests/drives/requirements-$name.txt" >/dev/null
}

resolve langchain "langchain-tests langchain-openai langchain-anthropic pytest"
resolve lm-eval "lm-eval[api]" --no-binary rouge-score --no-binary sqlitedict --no-binary word2number

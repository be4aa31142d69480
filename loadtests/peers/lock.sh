#!/usr/bin/env bash
# Resolves the peers' environments anew: names, versions and hashes, no addresses. Wheels only, so that nothing of a
# peer runs while it is installed. Starts from requirements.lock: what we share with a peer has the same version.
# LiteLLM is exactly 1.91.1, see docs/peers.md. tests/loadtests/test_peers.py holds the result against that.
set -euo pipefail
cd "$(dirname "$0")/../.."
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}}
export SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}}

resolve() {
    local name=$1
    shift
    cp requirements.lock "loadtests/peers/requirements-$name.txt"
    printf '%s\n' "$@" | .venv/bin/uv pip compile - --generate-hashes --only-binary :all: --no-emit-index-url \
        --no-emit-find-links --no-header --no-annotate --python-platform x86_64-manylinux_2_28 --python-version 3.11 \
        --quiet --output-file "loadtests/peers/requirements-$name.txt" >/dev/null
}

resolve litellm 'litellm[proxy]==1.91.1' litellm-proxy-extras==0.4.74 litellm-enterprise==0.1.44
resolve vllm-router vllm-router==0.1.17
# What ray.serve.llm imports and our environment lacks; it is laid over ours (environment.py).
resolve ray-llm pyarrow
# Of LiteLLM's two files only the wheel that was judged may be installed, not the source beside it.
wheel=bf8e3d23cddf0eb4c05714dffcaafd8a944adf0f9c9b01c6c863b2637309de2e
sed -i "/^litellm==/,/^[a-z]/{/--hash/{/$wheel/!d}}" loadtests/peers/requirements-litellm.txt

#!/usr/bin/env bash
# Makes the Python environment of the clients that are run against `cadre serve` (openai, anthropic, lm_eval), and prints
# the path of its interpreter.
#
#   PY="$(bash bench/peers/clients.sh)" && "$PY" bench/peers/serve_clients.py target/debug/cadre
#
# The environment lies in .cache/venv/clients (ignored by git), about 500 MiB; the download is about 120 MiB and comes from
# PyPI alone.
# Needs python3 >= 3.11 with the venv module. PYTHON=... picks another interpreter.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$here/../../golden/make/venv.sh"
venv clients "$here/requirements-clients.txt" "the clients (about 120 MiB to download)" 'import anthropic, openai; from lm_eval import simple_evaluate' --no-compile

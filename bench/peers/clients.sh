#!/usr/bin/env bash
# Makes the Python environment of the clients that are run against `cadre serve` (openai, anthropic, lm_eval), and prints
# the path of its interpreter.
#
#   PY="$(bash bench/peers/clients.sh)" && "$PY" bench/peers/serve_clients.py target/debug/cadre
#
# The environment lies in .cache/venv/clients (ignored by git), about 500 MiB; the download is about 120 MiB and comes from
# PyPI alone. Running the script again is free: a stamp remembers the requirements it was made from.
# Needs python3 >= 3.11 with the venv module. PYTHON=... picks another interpreter.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
venv="$root/.cache/venv/clients"
requirements="$here/requirements-clients.txt"
stamp="$venv/.requirements"
python="${PYTHON:-python3}"

if ! cmp -s "$requirements" "$stamp" 2>/dev/null; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "clients.sh: $python is older than Python 3.11; set PYTHON to a newer one" >&2; exit 1; }
  echo "clients.sh: installing the clients into $venv (about 120 MiB to download)" >&2
  mkdir -p "$(dirname "$venv")"
  "$python" -m venv "$venv" >&2
  "$venv/bin/python" -m pip install --quiet --no-deps --no-compile --disable-pip-version-check \
    --requirement "$requirements" >&2
  "$venv/bin/python" -c 'import anthropic, openai; from lm_eval import simple_evaluate' >&2
  cp "$requirements" "$stamp"
fi
echo "$venv/bin/python"

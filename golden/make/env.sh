#!/usr/bin/env bash
# Makes the Python environment of the references and peers, and prints the path of its interpreter.
#
#   PY="$(bash golden/make/env.sh)" && "$PY" golden/make/checkpoints.py
#
# The environment lies in .cache/venv/peers (ignored by git), about 4 GiB; the download is about 2 GiB and comes
# from PyPI alone. Running the script again is free: a stamp remembers the requirements it was made from.
# Needs python3 >= 3.11 with the venv module on x86_64 Linux. PYTHON=... picks another interpreter.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
venv="$root/.cache/venv/peers"
requirements="$here/requirements.txt"
stamp="$venv/.requirements"
python="${PYTHON:-python3}"

if ! cmp -s "$requirements" "$stamp" 2>/dev/null; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "env.sh: $python is older than Python 3.11; set PYTHON to a newer one" >&2; exit 1; }
  echo "env.sh: installing the peers into $venv (about 2 GiB to download)" >&2
  mkdir -p "$(dirname "$venv")"
  "$python" -m venv "$venv" >&2
  "$venv/bin/python" -m pip install --quiet --no-deps --disable-pip-version-check \
    --requirement "$requirements" >&2
  "$venv/bin/python" -c 'import torch, transformers, safetensors, tokenizers' >&2
  cp "$requirements" "$stamp"
fi
echo "$venv/bin/python"

#!/usr/bin/env bash
# Makes the Python environment of mergekit, and prints the path of its interpreter.
#
#   PY="$(bash golden/make/mergekit.sh)" && "$PY" golden/make/mergekit_moe.py
#
# The environment lies in .cache/venv/mergekit (ignored by git), about 150 MiB beside that of env.sh, whose packages it sees.
# Everything comes from PyPI.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
peers="$(bash "$here/env.sh")"
venv="$(dirname "$(dirname "$(dirname "$peers")")")/mergekit"
requirements="$here/requirements-mergekit.txt"
stamp="$venv/.requirements"

if ! cmp -s "$requirements" "$stamp" 2>/dev/null; then
  echo "mergekit.sh: installing mergekit into $venv" >&2
  "$peers" -m venv "$venv" >&2
  purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
  "$peers" -c "$purelib" > "$("$venv/bin/python" -c "$purelib")/peers.pth"
  "$venv/bin/python" -m pip install --quiet --no-deps --disable-pip-version-check --requirement "$requirements" >&2
  "$venv/bin/python" -c 'import mergekit.scripts.moe' >&2
  cp "$requirements" "$stamp"
fi
echo "$venv/bin/python"

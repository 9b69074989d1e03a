#!/usr/bin/env bash
# Makes the Python environment of llama.cpp (llama-cpp-python and gguf), and prints the path of its interpreter.
#
#   PY="$(bash bench/peers/llama.sh)" && "$PY" golden/make/llama_logits.py --help
#
# The environment lies in .cache/venv/llama (ignored by git), about 150 MiB; everything comes from PyPI. llama.cpp is
# compiled from the pinned source archive: 15 to 30 minutes on two cores, once. Needs python3 >= 3.11 with the venv
# module, a C++17 compiler and x86_64 or aarch64 Linux. PYTHON=... picks another interpreter.
# Beside it, .cache/llama.cpp holds the archive's own converter (convert_hf_to_gguf.py, conversion/, gguf-py/), which
# golden/make/gguf_models.py runs inside the other environment.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
venv="$root/.cache/venv/llama"
requirements="$root/golden/make/requirements-llama.txt"
stamp="$venv/.requirements"
python="${PYTHON:-python3}"
archive="llama_cpp_python-0.3.36.tar.gz"
sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
downloads="$root/.cache/data/downloads"
source="$root/.cache/llama.cpp"

if ! cmp -s "$requirements" "$stamp" 2>/dev/null || [ ! -f "$source/convert_hf_to_gguf.py" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "llama.sh: $python is older than Python 3.11; set PYTHON to a newer one" >&2; exit 1; }
  mkdir -p "$downloads" "$(dirname "$venv")"
  if [ ! -f "$downloads/$archive" ]; then
    echo "llama.sh: downloading $archive (77 MB)" >&2
    partial="$(mktemp -d "$downloads/.llama.XXXXXX")"
    trap 'rm -rf "$partial"' EXIT
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
      --no-binary llama-cpp-python --dest "$partial" llama-cpp-python==0.3.36 >&2 || true
    [ -f "$partial/$archive" ] || { echo "llama.sh: pip brought no $archive; place it in $downloads" >&2; exit 1; }
    mv "$partial/$archive" "$downloads/$archive"
  fi
  echo "$sha256  $downloads/$archive" | sha256sum --check --quiet >&2 ||
    { echo "llama.sh: $downloads/$archive is not the pinned archive; remove it and try again" >&2; exit 1; }
fi

if [ ! -f "$source/convert_hf_to_gguf.py" ]; then
  rm -rf "$source.partial"
  mkdir -p "$source.partial"
  inside="${archive%.tar.gz}/vendor/llama.cpp"
  tar -xzf "$downloads/$archive" -C "$source.partial" --strip-components=3 \
    "$inside/convert_hf_to_gguf.py" "$inside/conversion" "$inside/gguf-py" "$inside/LICENSE"
  rm -rf "$source"
  mv "$source.partial" "$source"
fi

if ! cmp -s "$requirements" "$stamp" 2>/dev/null; then
  echo "llama.sh: compiling llama.cpp into $venv (15 to 30 minutes)" >&2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" >&2
  grep -v '^llama_cpp_python' "$requirements" >"$venv/requirements-rest.txt"
  "$venv/bin/python" -m pip install --quiet --no-deps --disable-pip-version-check \
    --requirement "$venv/requirements-rest.txt" "$downloads/$archive" >&2
  "$venv/bin/python" -c 'import gguf, llama_cpp; assert llama_cpp.__version__ == "0.3.36"' >&2
  cp "$requirements" "$stamp"
fi
echo "$venv/bin/python"

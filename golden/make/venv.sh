# Makes a Python environment from a list of requirements, and prints the path of its interpreter. Sourced by the scripts
# that make one each:
#
#   venv NAME REQUIREMENTS WORDS IMPORTS [PIP_FLAG...]
#
# It lies in .cache/venv/NAME (ignored by git). Calling it again is free: a stamp remembers the requirements that it was made
# from. Needs python3 >= 3.11 with the venv module; PYTHON=... picks another interpreter. WORDS say what is installed and how
# much is downloaded, IMPORTS is a line of Python that must work afterwards.
venv() {
  local name="$1" requirements="$2" words="$3" imports="$4"
  shift 4
  local here
  here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
  local venv="$here/.cache/venv/$name" python="${PYTHON:-python3}" script="${0##*/}"
  local stamp="$venv/.requirements"
  if ! cmp -s "$requirements" "$stamp" 2>/dev/null; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "$script: $python is older than Python 3.11; set PYTHON to a newer one" >&2; return 1; }
    echo "$script: installing $words into $venv" >&2
    mkdir -p "$(dirname "$venv")"
    "$python" -m venv "$venv" >&2 || return
    "$venv/bin/python" -m pip install --quiet --no-deps --disable-pip-version-check "$@" \
      --requirement "$requirements" >&2 || return
    "$venv/bin/python" -c "$imports" >&2 || return
    cp "$requirements" "$stamp"
  fi
  echo "$venv/bin/python"
}

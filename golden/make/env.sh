#!/usr/bin/env bash
# Makes the Python environment of the references and peers, and prints the path of its interpreter.
#
#   PY="$(bash golden/make/env.sh)" && "$PY" golden/make/checkpoints.py
#
# The environment lies in .cache/venv/peers (ignored by git), about 4 GiB; the download is about 2 GiB and comes
# from PyPI alone.
# Needs python3 >= 3.11 with the venv module on x86_64 Linux. PYTHON=... picks another interpreter.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$here/venv.sh"
venv peers "$here/requirements.txt" "the peers (about 2 GiB to download)" 'import torch, transformers, safetensors, tokenizers'

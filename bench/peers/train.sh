#!/usr/bin/env bash
# Training speed of Cadre next to PyTorch + transformers. Makes the peers' environment on first use (about 4 GiB).
# Build the binary first: cargo build --release. Options are those of train.py: bash bench/peers/train.sh --help
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$(bash "$here/env.sh")"
exec "$python" "$here/train.py" "$@"

#!/usr/bin/env bash
# Runs a command with Vulkan drivers that compute on the processor; without one, the tests in card.rs:
#   bash crates/train/tests/card/software.sh
#   bash crates/train/tests/card/software.sh cadre train recipes/nano.toml --set train.device=vulkan-software
# Needs such a driver (Debian: mesa-vulkan-drivers) and a C compiler. plain_memory.c says why the drivers get a layer.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../../../.." && pwd)"
layer="$root/.cache/vulkan-layer"
mkdir -p "$layer"
"${CC:-cc}" -O1 -Wall -Wextra -shared -fPIC "$here/plain_memory.c" -o "$layer/libplain_memory.so"
cp "$here/plain_memory.json" "$layer/"
export VK_LAYER_PATH="$layer" VK_INSTANCE_LAYERS=VK_LAYER_cadre_plain_memory
if [ $# -eq 0 ]; then
    cd "$root"
    set -- cargo test --release --features vulkan -p cadre -p cadre-train --test card -- --nocapture
fi
exec "$@"

#!/usr/bin/env bash
# The peers use the environment of the references: one download serves both. Prints the path of its interpreter.
set -euo pipefail
exec bash "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/../../golden/make/env.sh"

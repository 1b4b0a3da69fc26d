#!/usr/bin/env bash
# Linters and tests, two at a time: those of a few minutes, or with --all the long matrices and chaos too.
# Further arguments go to pytest, for instance: ./launchers/test.sh -k partition, or on a GPU: ./launchers/test.sh -m gpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
marks="not slow and not gpu"
if [[ "${1:-}" == "--all" ]]; then
  marks="not gpu"
  shift
fi
source launchers/setup.sh
workers=0
if [[ " $* " != *" -m gpu "* ]]; then
  workers=2
  export DS_ACCELERATOR=cpu # the other tests have layouts of many ranks
fi
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
lint-imports
exec pytest -n "$workers" -m "$marks" "$@"

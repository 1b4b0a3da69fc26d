#!/usr/bin/env bash
# From a fresh clone to a ranked table: make .venv, install, and run the first sweep on what this machine has.
# Further arguments are overrides of the sweep, for instance: ./launchers/quickstart.sh train.steps=40
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/setup.sh
exec .venv/bin/python launchers/sweep.py sweep=quickstart "$@"

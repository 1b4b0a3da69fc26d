"""Rebuild the tables of a sweep from its files: `python launchers/report.py results/NAME [--columns A,B] [--wandb]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.record.report import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

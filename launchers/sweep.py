"""Run a grid of layouts: `python launchers/sweep.py KEY=A,B,C ... [OVERRIDE ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.launch.sweep import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

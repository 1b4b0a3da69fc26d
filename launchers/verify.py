"""Prove that a layout computes the same training as one rank: `python launchers/verify.py [OVERRIDE ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.spec.help import answer_help

if __name__ == "__main__":
    answer_help()
    from harness.launch.verify import main

    sys.exit(main(sys.argv[1:]))

"""Generate text, or measure inference: `python launchers/generate.py [generate.prompt=TEXT] [OVERRIDE ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.spec.help import answer_help

if __name__ == "__main__":
    answer_help()
    from harness.launch.generate import main

    sys.exit(main(sys.argv[1:]))

"""Rebuild the tables of a sweep from its files: `python launchers/report.py results/NAME [--columns A,B] [--wandb]`.

results/NAME     folder of a sweep or of single runs
--columns A,B,C  print just these columns of results.csv
--wandb          write the runs that wandb does not have yet
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.spec.help import answer_help

if __name__ == "__main__":
    answer_help()
    from harness.launch.report import main

    sys.exit(main(sys.argv[1:]))

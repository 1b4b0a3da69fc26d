"""Draw a pipeline schedule without running it: `python launchers/schedule.py [OVERRIDE ...] [--csv FILE] [--png FILE]`.

--csv FILE  write it as parallel.schedule=FILE reads it
--png FILE  draw it as a picture
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.spec.help import answer_help

if __name__ == "__main__":
    answer_help()
    from harness.launch.schedule import main

    sys.exit(main(sys.argv[1:]))

"""Train one layout: `deepspeed --num_gpus N launchers/train.py [OVERRIDE ...]`, or `python` instead of `deepspeed`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.launch import train

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if train.in_rank():
        from harness.run.worker import main_started_by_user

        main_started_by_user(lambda: train.prepare(arguments, int(os.environ["WORLD_SIZE"])))
    else:
        sys.exit(train.main(arguments))

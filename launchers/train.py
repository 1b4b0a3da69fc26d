"""Train one layout: `deepspeed --num_gpus N launchers/train.py [OVERRIDE ...]`, or `python` instead of `deepspeed`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.launch.rank import in_rank
from harness.spec.help import answer_help

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if in_rank():
        from harness.launch.train import prepare
        from harness.run.worker import main_started_by_user

        main_started_by_user(lambda: prepare(arguments, int(os.environ["WORLD_SIZE"])))
    else:
        answer_help()
        from harness.launch.train import main

        sys.exit(main(arguments))

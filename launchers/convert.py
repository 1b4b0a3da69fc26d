"""Bring weights from and to transformers: `python launchers/convert.py import|export FROM TO [--dtype TYPE]`.

import HF_DIR CHECKPOINT_DIR  write a checkpoint of a save_pretrained folder, for model.weights=CHECKPOINT_DIR
export CHECKPOINT_DIR HF_DIR  write a save_pretrained folder of a checkpoint, or of the newest of a run's directory
--dtype TYPE                  export as float32, bfloat16 or float16, not in the types the weights came in
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.spec.help import answer_help

if __name__ == "__main__":
    answer_help()
    from harness.run.conversion import main

    sys.exit(main(sys.argv[1:]))

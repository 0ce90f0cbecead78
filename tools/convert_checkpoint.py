"""Convert checkpoints from and to Hugging Face: what `agrpo convert` does, without installing.

python tools/convert_checkpoint.py to-megatron SOURCE TARGET
python tools/convert_checkpoint.py to-hf SOURCE TARGET
python tools/convert_checkpoint.py verify A B
"""

import sys

from agrpo_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))

"""Measure DPO at 1.1B x 2,048 tokens on a GPU, ours and TRL (if installed); see benchmarks/dpo.py.

python -m benchmarks.dpo_memory --output benchmarks/results/dpo_memory.json
"""

import sys

import torch

from benchmarks.dpo import main

if __name__ == "__main__":
    shape = "1b" if torch.cuda.is_available() else "tiny"
    main(
        [
            "--shape",
            shape,
            "--rounds",
            "1",
            "--contenders",
            "ours",
            "trl_precomputed",
            "trl",
            *sys.argv[1:],
        ]
    )

"""Train GPT-2 medium (350M) on .bin shards as fast as possible: track 2 of the nanoGPT speedrun.

    torchrun --nproc_per_node=8 train_gpt_medium.py
    ./run.sh train_gpt_medium.py

The flags are those of train_gpt.py.
"""

from train_gpt import main

if __name__ == "__main__":
    main(__doc__, "configs/speedrun/medium/current.yaml")

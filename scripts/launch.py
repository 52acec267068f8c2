"""torchrun without its tracebacks: when a rank stops on a mistake, its own sentence is the last word, and its status ours.

python -m scripts.launch --nproc_per_node=2 train.py --config configs/quickstart/base.yaml
python -m scripts.launch --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py ...  # on each

All of torchrun's flags pass through; without those for several machines it stays on this one. --max-restarts=3 starts the
ranks again when one of them dies; they go on from the newest checkpoint.
"""

import argparse
import logging
import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from training.supervisor import DRIVER, end_with_driver

SEVERAL = ("nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "master_addr", "master_port")
REASONS = {6: "6 is how NCCL ends a rank when another is gone", 9: "9 often means no memory"}


def main() -> None:
    end_with_driver(os.environ.pop(DRIVER, None))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # after a signal ranks save; torchrun would wait 30 s
    # torch 2.13 keeps one store over restarts, in which new ranks find the addresses of the dead: let rank 0 open a new one
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    logging.disable(logging.ERROR)  # the launcher's own words; what the ranks print is untouched
    try:
        run.run(_arguments(sys.argv[1:]))
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=lambda failed: failed[1].timestamp)
        if first.exitcode < 0:
            why = REASONS.get(-first.exitcode)
            print(f"error: rank {rank} was ended by signal {-first.exitcode}" + (f"; {why}" if why else ""), file=sys.stderr)
        raise SystemExit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode) from None
    except SignalException as error:  # passed on to the ranks, which have saved
        raise SystemExit(128 + error.sigval) from None


def _arguments(given: list[str]) -> argparse.Namespace:
    """torchrun's, with --standalone, which finds a free port of this machine, unless a flag or PET_<FLAG> is for several."""
    arguments, default = run.parse_args(given), run.get_args_parser().get_default
    asked = [name for name in SEVERAL if getattr(arguments, name) != default(name) or f"PET_{name.upper()}" in os.environ]
    if not asked or (asked == ["nnodes"] and arguments.nnodes == "1"):
        arguments.standalone = True
    return arguments


if __name__ == "__main__":
    main()

"""torchrun without its tracebacks: when a rank stops on a mistake, its own sentence is the last word, and its status ours.

python -m scripts.launch --nproc_per_node=2 train.py --config configs/quickstart/base.yaml
"""

import logging
import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # after a signal ranks save; torchrun would wait 30 s
    logging.disable(logging.ERROR)  # the launcher's own words; what the ranks print is untouched
    try:
        run.run(run.parse_args(["--standalone", *sys.argv[1:]]))
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        if first.exitcode < 0:
            print(
                f"error: rank {first.local_rank} was ended by signal {-first.exitcode}; 9 often means no memory", file=sys.stderr
            )
        raise SystemExit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode) from None
    except SignalException as error:  # passed on to the ranks, which have saved
        raise SystemExit(128 + error.sigval) from None


if __name__ == "__main__":
    main()

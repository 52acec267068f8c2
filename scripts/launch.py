"""torchrun without its traceback: when a rank stops on a mistake, its own sentence is the last word, and its status ours.

python -m scripts.launch --nproc_per_node=2 train.py --config configs/quickstart/base.yaml
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(["--standalone", *sys.argv[1:]]))
    except ChildFailedError as error:
        codes = [abs(failure.exitcode) for failure in error.failures.values() if failure.exitcode]
        raise SystemExit(codes[0] if codes else 1) from None


if __name__ == "__main__":
    main()

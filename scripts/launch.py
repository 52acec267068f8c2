"""Run torchrun without its tracebacks; exit with the status of the first failed rank.

Once the project is installed, plain torchrun behaves the same for its scripts (torchrun_plugin.py).

python -m scripts.launch --nproc_per_node=2 train.py --test_mode --steps 100
python -m scripts.launch --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
    --rdzv_endpoint=HOST:29400 train.py --config configs/phase1_pretrain.yaml    # on each machine

Accepts all of torchrun's flags. Without a multi-node flag, all ranks run on this machine.
--max-restarts=3 restarts the ranks from the newest checkpoint when one of them dies.
"""

import argparse
import os
import sys
from pathlib import Path

from torch.distributed import run

from cli import user_errors
from torchrun_plugin import ROOT, exit_status, prepare
from training.ops.supervisor import DRIVER, terminate_with_driver

MULTI_NODE = (
    "nnodes",
    "node_rank",
    "rdzv_backend",
    "rdzv_endpoint",
    "rdzv_id",
    "rdzv_conf",
    "master_addr",
    "master_port",
)


def main() -> None:
    terminate_with_driver(os.environ.pop(DRIVER, None))
    prepare()
    with user_errors():
        arguments = _arguments(sys.argv[1:])
    try:
        run.run(arguments)
    except Exception as error:
        if (status := exit_status(error)) is None:
            raise
        raise SystemExit(status) from None


def _arguments(argv: list[str]) -> argparse.Namespace:
    """Parse torchrun's arguments; add --standalone, which finds a free port, for a single node.

    A flag of MULTI_NODE, or its environment variable PET_<FLAG>, selects several nodes.
    """
    arguments, default = run.parse_args(argv), run.get_args_parser().get_default
    multi_node = [
        name
        for name in MULTI_NODE
        if getattr(arguments, name) != default(name) or f"PET_{name.upper()}" in os.environ
    ]
    if not multi_node or (multi_node == ["nnodes"] and arguments.nnodes == "1"):
        arguments.standalone = True
    if arguments.module:
        return arguments
    script = Path(str(arguments.training_script))
    if not script.exists() and (ROOT / script).is_file():  # the working folder is not the project
        arguments.training_script = str(ROOT / script)
    elif not arguments.no_python and not script.exists():
        raise ValueError(
            f"script {script} not found; "
            "the entry points are train.py, train_sft.py, train_dpo.py and train_gpt.py"
        )
    return arguments


if __name__ == "__main__":
    main()

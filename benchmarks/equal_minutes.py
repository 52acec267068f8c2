"""Train another code base on the quickstart text for some steps; validate like train_gpt.py.

    python -m benchmarks.equal_minutes nanochat --source my_nanochat --logs logs/my_nanochat
    python -m benchmarks.equal_minutes hf_trainer --logs logs/my_hf --steps 60 lr=1e-3

Peers: nanochat, modded_nanogpt, nanogpt, litgpt, hf_trainer. --source is the checkout of a peer, or
the folder of its packages. Width, depth, batch and row length are those of
configs/quickstart/base.yaml. The peer's schedule runs over the given steps; scripts.experiment
finds the steps that take the same time. Validation is not timed, and the first 3 steps count as
median steps, because they include start-up and compilation.
Writes metrics.jsonl for scripts.experiment, and peer.json with parameters and tokens per second.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.equal_minutes_peers import PEERS, Peer, PeerRun, build_peer
from benchmarks.side_by_side import machine
from cli import CommandParser, int_at_least, user_errors
from data.bin_loader import BinLoader, BinValidation
from data.bin_shards import BinShards, bin_token_bytes
from data.tokenizers.bpe import load_tokenizer, special_ids
from evals.eval_perplexity import perplexity
from files import write_json
from lab.experiment import UNTIMED_STEPS
from lab.measurements import timed_seconds
from training.config import RunConfig, load
from training.setup import git_output

CONFIG = "configs/quickstart/base.yaml"
Evaluate = Callable[[Peer], dict[str, float]]


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the peer")
    parser.add_argument("--logs", type=Path, required=True, help="folder of metrics.jsonl")
    parser.add_argument("--source", type=Path, help="checkout of the peer, or its packages")
    parser.add_argument("--steps", type=int_at_least(1), default=400, help="of training")
    parser.add_argument(
        "--seed", type=int_at_least(0), default=0, help="seed of the initial weights"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data/quickstart_bin"), help=".bin shards"
    )
    parser.add_argument(
        "--validations", type=int_at_least(0), default=5, help="number of validations"
    )
    args = parser.parse_intermixed_args()
    with user_errors():
        run = load(CONFIG)
        loader, evaluate = open_data(args.data, run)
        peer, settings = build_peer(args.peer, args.settings, args.source, run, args.seed)
        summary = train_peer(peer, loader, evaluate, args.steps, args.validations, args.logs)
        summary |= {"peer": args.peer, "settings": asdict(settings), "seed": args.seed}
        summary["commit"] = checkout_commit(args.source)
        summary |= machine(torch.device("cpu"), "transformers", "accelerate", "litgpt", "lightning")
        write_json(args.logs / "peer.json", summary)
        print(
            f"{args.peer}: {summary['steps']:,} steps, {summary['seconds']:.1f} s of training, "
            f"{summary['tokens_per_s']:,.0f} tok/s, "
            f"{summary.get('bits_per_byte', math.nan):.4f} bits per byte"
        )


def open_data(folder: Path, run: RunConfig) -> tuple[BinLoader, Evaluate]:
    """Return the training batches of a folder of .bin shards, and a validation on its val split.

    The rows are those of train_gpt.py with data.alignment=sequential; validation reads the whole
    split. ValueError if there is no text.
    """
    vocab, data = run.model.vocab_size, run.data
    token_bytes = bin_token_bytes(folder, vocab)
    if token_bytes is None:
        raise ValueError(
            f"{folder} has no tokenizer/; write the shards with python -m scripts.write_bin "
            f"--store {data.store} --output_dir {folder}"
        )
    bos = special_ids(load_tokenizer(folder / "tokenizer")).bos
    train, val = (BinShards(folder / f"*_{split}_*.bin", vocab, bos) for split in ("train", "val"))
    length = data.sequence_length
    loader = BinLoader(
        train, data.tokens_per_step, length, alignment="sequential", document_mask=False
    )
    batches = BinValidation(
        val, (len(val) - 1) // length * length, length, data.rows, document_mask=False
    )

    def evaluate(peer: Peer) -> dict[str, float]:
        return perplexity(Scored(peer), {"all": batches}, torch.from_numpy(token_bytes))["all"]

    return loader, evaluate


def checkout_commit(source: Path | None) -> str | None:
    """Return the commit of a checkout; None for another folder, e.g. of packages."""
    if source is None or git_output("rev-parse", "--show-prefix", folder=source):
        return None  # within another checkout
    return git_output("rev-parse", "--verify", "-q", "HEAD", folder=source) or None


class Scored(nn.Module):
    """A peer's model with the interface that evals.eval_perplexity scores."""

    def __init__(self, peer: Peer):
        super().__init__()
        self.model, self.losses = peer.model, peer.losses

    def forward(
        self, tokens: Tensor, targets: Tensor, doc_ids: None, rows: Tensor | None = None
    ) -> SimpleNamespace:
        return SimpleNamespace(nll=self.losses(tokens, targets))


def train_peer(
    peer: Peer,
    loader: BinLoader,
    evaluate: Evaluate,
    steps: int,
    validations: int,
    logs: Path,
) -> dict[str, Any]:
    """Train a peer and return a summary.

    Validates `validations` times, the last time after the last step, and writes
    logs/metrics.jsonl.
    """

    def batch(index: int) -> tuple[Tensor, Tensor]:
        [rows] = loader.at(index).batches
        return rows.tokens, rows.targets

    logs.mkdir(parents=True, exist_ok=True)
    tokens = loader.at(0).tokens
    due = {math.ceil(steps * part / validations) for part in range(1, validations + 1)}
    rows: list[dict[str, float]] = []
    with open(logs / "metrics.jsonl", "w", encoding="utf-8") as file:

        def record(step: int, step_s: float, loss: float) -> None:
            row = {"step": step, "tokens": step * tokens, "step_s": step_s, "loss": loss}
            row["tokens_per_s"] = tokens / step_s
            if step in due:
                values = evaluate(peer)
                row |= {f"val/{name}": values[name] for name in ("loss", "bits_per_byte", "tokens")}
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()

        clock = StepClock(record)
        peer.train(PeerRun(steps, batch, clock.after_step))
    total, embedded = parameters(peer.model, loader.shards.vocab_size)
    scores = {"val/loss": "loss", "val/bits_per_byte": "bits_per_byte", "val/tokens": "val_tokens"}
    return {
        "parameters": total,
        "non_embedding_parameters": total - embedded,
        "steps": steps,
        "seconds": timed_seconds(rows, [])[-1],
        "tokens_per_s": tokens / statistics.fmean(clock.seconds[UNTIMED_STEPS:] or clock.seconds),
        **{name: rows[-1][key] for key, name in scores.items() if key in rows[-1]},
    }


class StepClock:
    """Times each step. The first one starts at construction; time in `record` is excluded.

    record(step, seconds, loss) is called after each step, counted from 1.
    """

    def __init__(self, record: Callable[[int, float, float], None]):
        self.record, self.seconds, self.begin = record, list[float](), time.perf_counter()

    def after_step(self, loss: Tensor | float) -> None:
        value = float(loss)
        self.seconds.append(time.perf_counter() - self.begin)
        self.record(len(self.seconds), self.seconds[-1], value)
        self.begin = time.perf_counter()


def parameters(model: nn.Module, vocab_size: int) -> tuple[int, int]:
    """Return the number of parameters, and how many belong to the embeddings and the head."""
    embeddings = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    counted = list(model.parameters())
    embedded = [p for p in counted if id(p) in embeddings or p.shape[:1] == (vocab_size,)]
    return sum(p.numel() for p in counted), sum(p.numel() for p in embedded)


if __name__ == "__main__":
    main()

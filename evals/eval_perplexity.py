"""Held-out loss, perplexity and bits per byte, per source.

python -m evals.eval_perplexity --checkpoint checkpoints/quickstart/gold/step_300 --dataset data/store/quickstart
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from data.dataloader import Batch, validation_batches
from data.manifest import file_hash
from data.shards import TokenShards
from data.tokenizer import load_tokenizer, token_bytes
from entrypoint import user_errors
from models.hf import load_hf
from models.losses import IGNORE


@torch.no_grad()
def perplexity(
    model: nn.Module,
    sources: Mapping[str, Iterable[Batch]],
    bytes_of: Tensor,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, dict[str, float]]:
    """Per source, and over all targets of all sources as "all": loss (nats a token), perplexity, bits_per_byte, tokens.

    bytes_of [vocab]: bytes of text a token stands for; bits are divided by the bytes of the very targets that were scored.
    total: adds a tensor up over ranks. Totals are divided, never ratios averaged.
    """
    device = next(model.parameters()).device
    bytes_of = bytes_of.to(device)
    everything = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    results = {}
    for name, batches in sources.items():
        sums = torch.zeros_like(everything)
        for batch in batches:
            batch = batch.to(device)
            valid = batch.targets != IGNORE
            nll = model(batch.tokens, batch.targets, batch.docs).nll
            sums += torch.stack([nll.double().sum(), valid.sum(), bytes_of[batch.targets[valid]].sum()])
        sums = total(sums)
        everything += sums
        results[name] = _figures(sums)
    return {**results, "all": _figures(everything)}


def _figures(sums: Tensor) -> dict[str, float]:
    nats, tokens, text_bytes = sums.tolist()
    loss = nats / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    bits = nats / math.log(2) / text_bytes if text_bytes else math.nan
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a step folder, or any Hugging Face Llama folder")
    parser.add_argument("--dataset", required=True, type=Path, help="a data store; its held-out splits are measured")
    parser.add_argument("--sources", nargs="*", help="which sources of it (default: all)")
    parser.add_argument("--sequence_length", type=int, help="tokens a row (default: the model's context)")
    parser.add_argument("--limit", type=int, help="rows a source (default: all)")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    with user_errors():
        model = load_hf(args.checkpoint, dtype=None, device=args.device)
        tokenizer = load_tokenizer(args.checkpoint)
        present = sorted(path.name for path in (args.dataset / "tokens").glob("*") if path.is_dir())
        unknown = set(args.sources or []) - set(present)
        if unknown or not present:
            raise ValueError(f"{args.dataset} has no source {' '.join(sorted(unknown))}; it has: {', '.join(present) or 'none'}")
        length = args.sequence_length or model.config.max_position_embeddings
        sources = {}
        for name in args.sources or present:
            shards = TokenShards(args.dataset / "tokens" / name, "val")
            if shards.tokenizer != file_hash(args.checkpoint / "tokenizer.json"):
                raise ValueError(f"{shards.folder} was made with another tokenizer than {args.checkpoint} has; tokenize it again")
            sources[name] = validation_batches(shards, length, args.batch_size, args.limit)
        results = perplexity(model.eval(), sources, torch.from_numpy(token_bytes(tokenizer)))
        for name, figures in results.items():
            text = f"perplexity {figures['perplexity']:8.2f}  bits per byte {figures['bits_per_byte']:.3f}"
            print(f"{name:>12}  {text}  ({figures['tokens']:,.0f} tokens)")
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            report = {"task": "perplexity", "checkpoint": str(args.checkpoint), "sequence_length": length, "metrics": results}
            args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Convert a dense checkpoint to a mixture of experts: sparse upcycling (arXiv:2212.05055).

python -m scripts.upcycle --checkpoint checkpoints/quickstart/gold \\
    --output_dir checkpoints/upcycled_init --experts 8 --top_k 2

Each expert is a copy of the dense feed-forward network. The weights of a token's experts add up to
1, so without --noise the new model computes the same function as the dense model. To train it, use
init_from=<output_dir> and the model settings that this command prints.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cli import CommandParser, int_at_least, user_errors, within
from data.chat.trained_chat import KEY
from data.tokenizers.folder import copy_files
from files import check_free_space, temporary
from models.hf import check_model_folder, config_json, load_hf, resolve_checkpoint, save_hf
from models.moe import MoEConfig
from models.nanollama import ModelConfig, NanoLlama
from ranges import MAX_INT, above, at_least

KEPT = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id", KEY: KEY}


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=resolve_checkpoint,
        help="a dense model: a step or phase folder, or a Llama or Qwen3 folder",
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="new folder of the mixture")
    parser.add_argument(
        "--experts", type=int_at_least(1), default=8, help="experts per layer (default: 8)"
    )
    parser.add_argument(
        "--top_k", type=int_at_least(1), default=2, help="experts per token (default: 2)"
    )
    parser.add_argument(
        "--noise",
        type=within(float, at_least(0)),
        default=0.0,
        help="noise on each copy, relative to the standard deviation of a matrix (default: 0)",
    )
    parser.add_argument(
        "--router_std",
        type=within(float, above(0)),
        default=0.02,
        help="standard deviation of the router's weights (default: 0.02)",
    )
    parser.add_argument(
        "--seed", type=within(int, at_least(0, below=MAX_INT)), default=0, help="(default: 0)"
    )
    args = parser.parse_args()
    with user_errors():
        dense = open_dense(args.checkpoint, args.output_dir, args.top_k)
        moe = MoEConfig(args.experts, args.top_k, expert_size=dense.config.intermediate_size)
        config = replace(dense.config, kind="moe", moe=moe)
        size = config.num_parameters * dense.norm.weight.dtype.itemsize
        check_free_space(args.output_dir.parent, size, "the mixture")
        weights = upcycle(dense, config, args.router_std, args.noise, args.seed)
        save(args.output_dir, args.checkpoint, config, weights)
        print(
            f"{args.output_dir}: {dense.config.num_parameters:,} parameters became "
            f"{config.num_parameters:,}, of which a token uses {config.num_active_parameters:,}\n"
            "train with the model settings of the dense one and\n"
            f"init_from={args.output_dir} model.kind=moe "
            f"'model.moe={{experts: {moe.experts}, top_k: {moe.top_k}, "
            f"expert_size: {moe.expert_size}}}' rope_theta={config.rope_theta:.10g} "
            f"model.max_position_embeddings={config.max_position_embeddings}"
        )


def open_dense(folder: Path, output: Path, top_k: int) -> NanoLlama:
    """Load the dense model in its stored dtype; ValueError if it cannot be upcycled."""
    if top_k == 1:
        raise ValueError(
            "--top_k 1 would change what the model computes: the output of a single expert is "
            "multiplied by its probability; give --top_k 2 or more"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output_dir {output} exists and is not empty; give a new folder")
    check_model_folder(folder)
    model = load_hf(folder, dtype=None)
    if model.config.kind == "moe":
        raise ValueError(f"{folder} is already a mixture of experts; give a dense checkpoint")
    return model


@torch.no_grad()
def upcycle(
    dense: NanoLlama, config: ModelConfig, router_std: float, noise: float, seed: int
) -> dict[str, Tensor]:
    """Return the mixture's weights by name: copies of the dense network, and random routers."""
    generator = torch.Generator().manual_seed(seed)
    experts, weights = config.moe.experts, {}
    for name, weight in dense.state_dict().items():
        prefix, feed_forward, projection = name.partition(".mlp.")
        if not feed_forward:
            weights[name] = weight
            continue
        copies = weight.expand(experts, *weight.shape).clone()
        if noise:
            std = noise * weight.float().std()
            for copy in copies:
                copy.add_((std * torch.randn(copy.shape, generator=generator)).to(copy.dtype))
        weights[f"{prefix}.mlp.experts.{projection.removesuffix('.weight')}"] = copies
    for layer in range(config.num_hidden_layers):
        # Small random scores, because equal scores would send all tokens to the same experts.
        router = router_std * torch.randn(experts, config.hidden_size, generator=generator)
        weights[f"layers.{layer}.mlp.router.weight"] = router.to(dense.norm.weight.dtype)
    return weights


def save(output: Path, source: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Write the mixture with the source's tokenizer and chat files; atomic.

    output: a new or empty folder.
    """
    stored = config_json(source)
    entries = {name: stored[key] for name, key in KEPT.items() if key in stored}
    scratch = temporary(output)
    try:
        save_hf(scratch, config, weights, weights["norm.weight"].dtype, **entries)
        copy_files(source, scratch)
        scratch.rename(output)  # also replaces an empty folder
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()

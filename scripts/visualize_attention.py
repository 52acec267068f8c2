"""Plot a model's attention: weights by distance per layer, attention sink, maps per head.

python -m scripts.visualize_attention --checkpoint checkpoints/quickstart/dpo --input_length 1024

Computes probabilities in chunks of rows and stores no [T, T] matrix.
"""

import math
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cli import CommandParser, int_at_least, user_errors
from data.tokenizers.bpe import load_tokenizer
from evals.engines import folder_hash
from inference.chat_formats import bos_and_stop_ids
from machine import add_device, exact_device
from models.attention import attention_mask
from models.hf import check_model_folder, load_hf, resolve_checkpoint
from models.layers import apply_rotary
from models.nanollama import GroupedQueryAttention, NanoLlama

CHUNK = 1 << 24  # probabilities per chunk, over all heads


class Attention(NamedTuple):
    """Means over queries, for L layers and H heads; fp64 on the CPU."""

    profile: Tensor  # [L, H, bins]: attention mass at distances 0, 1, 2-3, 4-7, ...
    sink: Tensor  # [L, H]: mass on the first token, over the later queries
    maps: Tensor  # [L, H, size, size]: mass of a band of queries on a band of keys


@torch.no_grad()
def attention_statistics(
    model: NanoLlama, tokens: Tensor, size: int = 64, chunk: int = CHUNK
) -> Attention:
    """Return the attention of one document, tokens [T]. chunk: probabilities per chunk."""
    x = model.embed_tokens(tokens[None])
    cos, sin = model.rotary(len(tokens))
    mask = attention_mask(None, x, model.attention)
    statistics = []
    layers: list[Any] = list(model.layers)
    for layer in layers:
        statistics.append(
            _head_statistics(layer.self_attn, layer.input_layernorm(x), cos, sin, size, chunk)
        )
        x, _ = layer(x, cos, sin, mask)
    return Attention(*(torch.stack(values).cpu() for values in zip(*statistics, strict=True)))


def _head_statistics(
    attention: GroupedQueryAttention, x: Tensor, cos: Tensor, sin: Tensor, size: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return profile, sink and maps of one layer's heads; x: its normalized input [1, T, D]."""
    length = x.shape[1]
    q, k = (
        proj(x).view(length, -1, attention.head_dim)
        for proj in (attention.q_proj, attention.k_proj)
    )
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    # [T, heads, head_dim] -> [heads, T, head_dim]
    device = exact_device(x.device)  # sums are in float64
    q, k = (apply_rotary(x.transpose(0, 1)[None], cos, sin)[0].to(device) for x in (q, k))
    heads = len(q)
    k = k.repeat_interleave(heads // len(k), 0).float().transpose(1, 2)
    positions = torch.arange(length, device=device)
    bands = positions * size // length
    bin_count = int(_bin(torch.tensor(length - 1))) + 1
    profile = torch.zeros(heads, bin_count, dtype=torch.float64, device=device)
    sink = torch.zeros(heads, dtype=torch.float64, device=device)
    maps = torch.zeros(heads, size, size, dtype=torch.float64, device=device)
    rows = max(1, chunk // (heads * length))
    for first in range(0, length, rows):
        queries = positions[first : first + rows]
        distance = queries[:, None] - positions  # [rows, T]; negative for later keys
        scores = q[:, queries].float() @ k / math.sqrt(attention.head_dim)
        mass = scores.masked_fill(distance < 0, -math.inf).softmax(-1).double()  # [heads, rows, T]
        bins = _bin(distance.clamp(min=0)).expand(heads, -1, -1)
        profile.scatter_add_(1, bins.flatten(1), mass.flatten(1))
        sink += mass[:, queries > 0, 0].sum(1)
        by_key = torch.zeros(heads, len(queries), size, dtype=torch.float64, device=device)
        by_key.scatter_add_(2, bands.expand(heads, len(queries), -1), mass)
        maps.index_add_(1, bands[queries], by_key)
    return (
        profile / length,
        sink / max(1, length - 1),
        maps / bands.bincount(minlength=size).clamp(min=1)[:, None],
    )


def _bin(distance: Tensor) -> Tensor:
    """Return the bin of a distance: 0 -> 0, 1 -> 1, 2-3 -> 2, 4-7 -> 3, ..."""
    return torch.where(distance > 0, distance.double().log2().floor() + 1, 0).long()


def bin_names(count: int) -> list[str]:
    return ["0", "1", *(f"{1 << (i - 1):,}+" for i in range(2, count))][:count]


def plot(
    attention: Attention, output: Path, title: str, about: dict[str, str] | None = None
) -> None:
    """Plot the layers by distance, the sink, and heads of up to six layers.

    about: text fields of the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers, heads, bins = attention.profile.shape
    shown = sorted({round(i * (layers - 1) / 5) for i in range(6)})
    columns = min(8, heads)
    figure = pyplot.figure(figsize=(6 + columns, 5 + 1.5 * len(shown)), layout="constrained")
    subfigures: Any = figure.subfigures(2, 1, height_ratios=[4, 1.5 * len(shown)])
    above, below = subfigures
    figure.suptitle(title)
    profile, share = above.subplots(1, 2, width_ratios=[3, 1], sharey=True)
    image = profile.imshow(attention.profile.mean(1), aspect="auto", cmap="magma", vmin=0)
    profile.set(
        xlabel="distance in tokens",
        ylabel="layer",
        title="attention mass by distance, mean of heads",
    )
    profile.set_xticks(range(bins), bin_names(bins), rotation=45, ha="right", fontsize=8)
    above.colorbar(image, ax=profile)
    share.barh(range(layers), attention.sink.mean(1), color="#3656c8")
    share.plot(
        attention.sink.flatten(),
        torch.arange(layers).repeat_interleave(heads),
        ".",
        color="#d9822b",
        markersize=3,
    )
    share.set(xlim=(0, 1), xlabel="share of the first token", title="sink: mean, and each head")
    axes = below.subplots(len(shown), columns, squeeze=False)
    for row, layer in enumerate(shown):
        for column in range(columns):
            head = column * heads // columns
            axes[row, column].imshow(
                (attention.maps[layer, head] + 1e-4).log(), cmap="magma", interpolation="nearest"
            )
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
            axes[row, column].set_title(f"layer {layer}, head {head}", fontsize=7)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110, format="png", metadata=about)
    pyplot.close(figure)


def tokens_of(checkpoint: Path, text: Path | None, length: int) -> Tensor:
    """Return bos, if the model has one, and the first tokens of a text: `length` in total.

    text: default: modules of Python's library. ValueError if the text is too short.
    """
    if text is not None and not text.is_file():
        raise ValueError(f"--text {text} does not exist")
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = (
        [text]
        if text
        else [
            library / f"{name}.py" for name in ("argparse", "typing", "tarfile", "doctest", "pydoc")
        ]
    )
    bos, _ = bos_and_stop_ids(checkpoint)
    content = "\n\n".join(path.read_text(errors="replace", encoding="utf-8") for path in paths)
    ids = [*bos, *load_tokenizer(checkpoint).encode(content, add_special_tokens=False).ids][:length]
    if len(ids) < length:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than {length}; "
            "give a longer --text or a smaller --input_length"
        )
    return torch.tensor(ids)


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint", required=True, type=resolve_checkpoint)
    parser.add_argument(
        "--input_length", type=int_at_least(2), default=8192, help="tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--text", type=Path, help="input document (default: modules of Python's library)"
    )
    parser.add_argument("--output", type=Path, default=Path("results/attention_visualizations.png"))
    add_device(parser)
    args = parser.parse_args()
    with user_errors():
        check_model_folder(args.checkpoint)
        model = load_hf(args.checkpoint, device=args.device).eval()
        if not 2 <= args.input_length <= model.config.max_position_embeddings:
            raise ValueError(
                f"--input_length {args.input_length} must be 2 to "
                f"{model.config.max_position_embeddings}, the model's context"
            )
        tokens = tokens_of(args.checkpoint, args.text, args.input_length).to(args.device)
        attention = attention_statistics(model, tokens)
        about = {
            "checkpoint_hash": folder_hash(args.checkpoint),
            "input_length": str(args.input_length),
        }
        plot(attention, args.output, f"{args.checkpoint}, {args.input_length:,} tokens", about)
        for layer, share in enumerate(attention.sink.mean(1).tolist()):
            print(f"layer {layer:>2}: {share:.3f} of the attention is on the first token")
        print(f"written to {args.output}")


if __name__ == "__main__":
    main()

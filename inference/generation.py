"""A key-value cache and text generation on it.

The trunk is written out a second time here, over the model's own leaves, so that training's forward knows of no cache.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.packed_weights import Layer, LinearOps, head, packed, plain
from inference.sampling import Sampling, choose, uniforms
from models.layers import RMSNorm, apply_rotary
from models.nanollama import GroupedQueryAttention, ModelConfig, NanoLlama

GREEDY = Sampling()
WORTH_PACKING = (
    8  # new tokens from which on another layout of the weights saves more time than it takes
)


class Cache:
    """Keys and values of `batch` rows with room for `length` tokens each; slot n of a row holds its token at position n.

    keys, values: one tensor [batch, key-value heads, length, head_dim] per layer. lengths: how many tokens of each row
    are held; what lies in later slots is never attended to, and setting a length back forgets what came after it.

    A shared prefix is computed once and continued by many rows:

        cache = Cache(model.config, 1, 900)
        forward(model, prefix[None], cache)                         # prefix [800]
        rows = cache.expand(64)                                     # 64 copies, at 800 tokens each
        hidden = forward(model, tokens, rows, lengths)              # tokens [64, T], padded on the right to T
        nll = token_losses(hidden, head(model), targets).nll        # models/losses.py; targets -100 where padding
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        length: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        """Empty, of the model's dtype. ValueError where `length` exceeds the model's context."""
        if length > config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens exceed the model's context of {config.max_position_embeddings}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        shape = (batch, config.num_key_value_heads, length, config.resolved_head_dim)
        self.config, self.length = config, length
        self.keys = [
            torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)
        ]
        self.values = [
            torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)
        ]
        self.lengths = [0] * batch
        self.graph: _Graph | None = (
            None  # the step of one token as a CUDA graph, where one was made
        )

    def select(self, rows: Sequence[int], length: int | None = None) -> "Cache":
        """A new cache of these rows, in this order, repeated where named twice; with room for `length` tokens if given."""
        first = self.keys[0]
        new = Cache(
            self.config,
            len(rows),
            self.length if length is None else length,
            first.device,
            first.dtype,
        )
        new.lengths = [self.lengths[row] for row in rows]
        held = max(new.lengths, default=0)
        if held > new.length:
            raise ValueError(
                f"a cache for {new.length} tokens cannot take rows of {held}; give it more length"
            )
        index = torch.tensor(rows, dtype=torch.int64, device=first.device)
        for old, copy in zip(self.keys + self.values, new.keys + new.values, strict=True):
            copy[:, :, :held] = old[index, :, :held]
        return new

    def expand(self, rows: int, length: int | None = None) -> "Cache":
        """A new cache of `rows` copies of the only row, with room for `length` tokens if given."""
        if len(self.lengths) != 1:
            raise ValueError(
                f"only a cache of one row expands, this one has {len(self.lengths)}; use select"
            )
        return self.select([0] * rows, length)


@torch.no_grad()
def forward(
    model: NanoLlama,
    tokens: Tensor,
    cache: Cache,
    lengths: Sequence[int] | None = None,
    matrices: LinearOps | None = None,
) -> Tensor:
    """Continue every row of the cache by its tokens [B, T]; returns the normed hidden states [B, T, D] for `logits`.

    lengths: how many of the T tokens of each row count, the rest being padding on the right, of any value in the
    vocabulary (default: all). The cache then holds that many more. Padding is not attended to; its own output is void.
    matrices: the model's, in another layout (default: as they lie in the model).
    ValueError where the longest row of the cache has no room for T more.
    """
    rows, length = tokens.shape
    starts = cache.lengths
    end = max(starts) + length
    if rows != len(starts):
        raise ValueError(f"{rows} rows of tokens do not fit a cache of {len(starts)} rows")
    if end > cache.length:
        raise ValueError(
            f"the cache has room for {cache.length} tokens, not for {end}; make it longer"
        )
    even = min(starts) == max(starts)
    first = torch.tensor(starts[:1] if even else starts, device=tokens.device)
    positions = first[:, None] + torch.arange(length, device=tokens.device)  # [1 or B, T]
    mask = None
    if end > length and not (even and length == 1):
        mask = (
            torch.arange(end, device=tokens.device) <= positions[:, None, :, None]
        )  # [1 or B, 1, T, end]
    counts = [length] * rows if lengths is None else [int(count) for count in lengths]
    full = min(counts) == length
    valid = (
        None
        if full
        else (torch.arange(length) < torch.tensor(counts)[:, None])
        .flatten()
        .nonzero()[:, 0]
        .to(tokens.device)
    )
    x = _trunk(model, matrices or plain(model), tokens, cache, positions, mask, end, valid)
    cache.lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    return x


@torch.no_grad()
def logits(model: NanoLlama, hidden: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., D], in the model's dtype."""
    return F.linear(hidden, head(model))


def _trunk(
    model: NanoLlama,
    matrices: LinearOps,
    tokens: Tensor,
    cache: Cache,
    positions: Tensor,
    mask: Tensor | None,
    end: int,
    valid: Tensor | None = None,
) -> Tensor:
    """Hidden states [B, T, D]. positions [1 or B, T] are where the tokens go; `end` slots are looked at, by mask.

    mask [1 or B, 1, T, end] is None where it is causal from an empty cache, or where T is 1 and all slots count.
    valid [N]: which of the B * T tokens are no padding; all but attention is computed of these only, others become 0.
    """
    rows, heads = tokens.shape[0], model.config.num_key_value_heads
    lines = torch.arange(rows * heads, device=tokens.device).view(rows, heads, 1) * cache.length
    slots = (
        lines + positions[:, None, :]
    ).flatten()  # of the cache as [B * heads * slots, head_dim]
    rotary = (
        model.rotary.cos[positions][:, :, None],
        model.rotary.sin[positions][:, :, None],
    )  # [1 or B, T, 1, head_dim]
    if mask is not None:
        mask = mask.repeat(
            1, 1, model.config.num_attention_heads // heads, 1
        )  # for the queries of a group in one matrix
    flat = tokens.flatten() if valid is None else tokens.flatten()[valid]
    x = model.embed_tokens(
        flat
    )  # [B * T or N, D]: a matrix product of matrices is a step less each time
    layers: list[Any] = list(model.layers)
    for layer, by, keys, values in zip(
        layers, matrices.layers, cache.keys, cache.values, strict=True
    ):
        x = x + _attention(
            layer.self_attn,
            by,
            _norm(layer.input_layernorm, x),
            rotary,
            keys,
            values,
            slots,
            mask,
            end,
            valid,
        )
        gate, up = by.gate_up(_norm(layer.post_attention_layernorm, x)).chunk(2, dim=-1)
        x = x + by.down(F.silu(gate) * up)
    return _spread(_norm(model.norm, x), valid, tokens.numel()).view(*tokens.shape, -1)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm.forward in fewer steps: for a few rows on a CPU it takes half the time. The same but for rounding in fp32."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = (size * size).mul_(1 / x.shape[-1]).add_(norm.eps).rsqrt_()
    return norm.weight * (x * scale).to(x.dtype)


def _spread(x: Tensor, valid: Tensor | None, places: int) -> Tensor:
    """Rows [N, ...] at their places among [places, ...], others 0."""
    return x if valid is None else x.new_zeros(places, *x.shape[1:]).index_copy_(0, valid, x)


def _attention(
    attention: GroupedQueryAttention,
    by: Layer,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    end: int,
    valid: Tensor | None,
) -> Tensor:
    """GroupedQueryAttention.forward over a cache, of x [B * T, D], or of those rows of it that are `valid`.

    The query heads that share a key head are rows of one matrix, so that keys and values are read once and never copied;
    scaled_dot_product_attention(enable_gqa=True) takes 3 to 6 times as long for one token in bf16 on a CPU.
    """
    size, rows, heads = attention.head_dim, keys.shape[0], keys.shape[1]
    length = slots.shape[0] // (rows * heads)
    qkv = _spread(by.qkv(x), valid, rows * length).view(rows, length, -1, size)
    qk, v = qkv.split((qkv.shape[2] - heads, heads), dim=2)
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = qk.split((qk.shape[2] - heads, heads), dim=2)
        qk = torch.cat((_norm(attention.q_norm, q), _norm(attention.k_norm, k)), dim=2)
    qk = apply_rotary(qk, *rotary).transpose(1, 2)  # [B, heads, T, head_dim]
    q, k = qk.split((qk.shape[1] - heads, heads), dim=1)
    v = v.transpose(1, 2)
    keys.view(-1, size).index_copy_(0, slots, k.reshape(-1, size))
    values.view(-1, size).index_copy_(0, slots, v.reshape(-1, size))
    group = q.shape[1] // heads
    if mask is None and length > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        grouped = q.reshape(
            rows, -1, group * length, size
        )  # [B, key-value heads, group * T, head_dim]
        out = F.scaled_dot_product_attention(
            grouped, keys[:, :, :end], values[:, :, :end], attn_mask=mask
        )
        out = out.reshape(q.shape)
    out = out.transpose(1, 2).reshape(rows * length, -1)
    return by.out(out if valid is None else out[valid])


class Event(NamedTuple):
    """One new token of a row. finish is given with a row's last: "stop" (a stop token, or `ended`) or "length"."""

    row: int
    token: int
    logprob: float | None  # under the model itself, before temperature, penalties and constraints
    finish: str | None


class Constraint(Protocol):
    """What one row may say (inference/grammar.py has one for JSON)."""

    def mask(self, scores: Tensor) -> None:
        """Set the scores [V] of tokens that may not come next to -inf, in place."""

    def accept(self, token: int) -> None:
        """Take note of the token that came."""


def stream(
    model: NanoLlama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] = (),
    ended: Callable[[int, list[int]], bool] | None = None,
    constraints: Sequence[Constraint | None] | None = None,
    logprobs: bool = False,
    cache: Cache | None = None,
    compile: bool = False,
) -> Iterator[Event]:
    """Continue each prompt (token ids, at least one, of any lengths); yields tokens as they come, row by row.

    seed: one for each row, or one number, of which row i takes seed + i; a row's draws do not depend on its neighbours.
    ended(row, new tokens) may end a row after each of its tokens. constraints: one a row, or None for a free one.
    cache: continue its rows, one prompt each. With one row it then holds all tokens but the last, and can be continued
    again; with more it is of no further use, since rows that end early are dropped on the way.
    compile: the step of one token as a compiled graph over the whole length of the cache, on a GPU as one CUDA graph;
    compiling takes some tens of seconds, once for each shape of a cache.

    ValueError where a prompt is empty, a token is not in the vocabulary, or prompt and new tokens exceed the context.
    """
    counts = [len(prompt) for prompt in prompts]
    _check(model, prompts, max_new_tokens, cache)
    weight = head(model)
    cache = cache or Cache(
        model.config, len(prompts), max(counts) + max_new_tokens - 1, weight.device, weight.dtype
    )
    luck = None
    if sampling.temperature > 0:
        seeds = [seed + row for row in range(len(prompts))] if isinstance(seed, int) else list(seed)
        luck = uniforms(seeds, max_new_tokens).to(weight.device)
    rows = list(range(len(prompts)))  # the numbers of the rows of the cache
    new: list[list[int]] = [[] for _ in prompts]
    alive = set(rows)
    tokens = torch.tensor(
        [[*prompt, *[0] * (max(counts) - len(prompt))] for prompt in prompts], device=weight.device
    )
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(
            len(prompts), model.config.vocab_size, dtype=torch.bool, device=weight.device
        )
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(prompt)] = True
    matrices = (
        packed(model, len(prompts))
        if max_new_tokens >= WORTH_PACKING and not compile
        else plain(model)
    )
    hidden = forward(model, tokens, cache, counts, matrices)
    with torch.no_grad():
        scores = matrices.head(hidden[torch.arange(len(prompts)), torch.tensor(counts) - 1])
    for step in range(max_new_tokens):
        with torch.no_grad():
            exact = scores.float()
            chosen = _choose(
                exact,
                sampling,
                seen,
                luck[rows, step] if luck is not None else None,
                constraints,
                rows,
                alive,
            )
            said = (
                exact.log_softmax(-1).gather(-1, chosen[:, None])[:, 0].tolist()
                if logprobs
                else [None] * len(rows)
            )
        ids = chosen.tolist()
        for place, row in enumerate(rows):
            if row not in alive:
                continue
            new[row].append(ids[place])
            if constraints is not None and (constraint := constraints[row]) is not None:
                constraint.accept(ids[place])
            stop = ids[place] in stop_tokens
            stop = (ended is not None and ended(row, new[row])) or stop
            finish = "stop" if stop else "length" if step + 1 == max_new_tokens else None
            if finish:
                alive.remove(row)
            yield Event(row, ids[place], said[place], finish)
        if not alive:
            return
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        if 2 * len(alive) <= len(rows) and not compile:  # go on with the rows that have not ended
            places = [place for place, row in enumerate(rows) if row in alive]
            rows, cache, chosen = (
                [rows[place] for place in places],
                cache.select(places),
                chosen[places],
            )
            seen = seen[places] if seen is not None else None
        scores = (
            decode_compiled(model, chosen, cache)
            if compile
            else _step(model, matrices, chosen, cache)
        )


@torch.inference_mode()  # a tenth faster than no_grad on a CPU
def _step(model: NanoLlama, matrices: LinearOps, tokens: Tensor, cache: Cache) -> Tensor:
    """Logits [B, V] after one more token [B] a row."""
    return matrices.head(forward(model, tokens[:, None], cache, matrices=matrices)[:, 0])


def _check(
    model: NanoLlama, prompts: Sequence[Sequence[int]], max_new_tokens: int, cache: Cache | None
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not prompts or not all(prompts):
        raise ValueError("each prompt needs at least one token; begin an empty one with bos")
    size = model.config.vocab_size
    odd = [token for prompt in prompts for token in prompt if not 0 <= token < size]
    if odd:
        raise ValueError(
            f"token {odd[0]} is not in the model's vocabulary of {size}; take the model's own tokenizer"
        )
    if cache is not None:
        if len(cache.lengths) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts do not fit a cache of {len(cache.lengths)} rows"
            )
        need = max(cache.lengths) + max(len(prompt) for prompt in prompts) + max_new_tokens - 1
        if need > cache.length:
            raise ValueError(
                f"the cache has room for {cache.length} tokens, not for {need}; make it longer"
            )


def _choose(
    scores: Tensor,
    sampling: Sampling,
    seen: Tensor | None,
    luck: Tensor | None,
    constraints: Sequence[Constraint | None] | None,
    rows: list[int],
    alive: set[int],
) -> Tensor:
    """The next token [B] of scores [B, V], which stay as they are."""
    if constraints is not None:
        scores = scores.clone()
        for place, row in enumerate(rows):
            if row in alive and (constraint := constraints[row]) is not None:
                constraint.mask(scores[place])
    return choose(scores, sampling, seen, luck)


@dataclass
class Row:
    """What `generate` gives for a prompt: new tokens (with the stop token that ended them), log-probabilities, why it ended."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # empty unless asked for
    finish: str = "length"


def generate(
    model: NanoLlama, prompts: Sequence[Sequence[int]], max_new_tokens: int, **how: Any
) -> list[Row]:
    """All of `stream` at once; the same arguments."""
    rows = [Row() for _ in prompts]
    for event in stream(model, prompts, max_new_tokens, **how):
        rows[event.row].tokens.append(event.token)
        if event.logprob is not None:
            rows[event.row].logprobs.append(event.logprob)
        rows[event.row].finish = event.finish or rows[event.row].finish
    return rows


def _decode(model: NanoLlama, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Logits [B, V] of one more token [B, 1] a row at positions [B, 1]; all shapes stay the same from step to step."""
    mask = torch.arange(cache.length, device=tokens.device) <= positions[:, None, :, None]
    matrices = plain(model)
    return matrices.head(
        _trunk(model, matrices, tokens, cache, positions, mask, cache.length)[:, 0]
    )


@functools.cache
def _compiled() -> Callable[[NanoLlama, Tensor, Tensor, Cache], Tensor]:
    return torch.compile(_decode, fullgraph=True, dynamic=False)


@torch.no_grad()
def decode_compiled(model: NanoLlama, tokens: Tensor, cache: Cache) -> Tensor:
    """Logits [B, V] after one more token [B] a row, by a compiled graph; on a GPU the CUDA graph of it belongs to the cache.

    What is returned on a GPU is overwritten by the next call.
    """
    if max(cache.lengths) == cache.length:
        raise ValueError(
            f"the cache has room for {cache.length} tokens, not for one more; make it longer"
        )
    positions = torch.tensor(cache.lengths, device=tokens.device)[:, None]
    if tokens.device.type != "cuda":
        scores = _compiled()(model, tokens[:, None], positions, cache)
    else:
        if cache.graph is None:
            cache.graph = _Graph(model, tokens[:, None].clone(), positions, cache)
        scores = cache.graph(tokens, positions)
    cache.lengths = [length + 1 for length in cache.lengths]
    return scores


class _Graph:
    """`_decode` as one CUDA graph: its inputs and its output keep their place in memory, and nothing is launched from Python."""

    def __init__(self, model: NanoLlama, tokens: Tensor, positions: Tensor, cache: Cache):
        self.tokens, self.positions = tokens, positions
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            aside
        ):  # a step may be done again: it writes the same keys into the same slots
            for _ in range(3):
                _compiled()(model, tokens, positions, cache)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.scores = _compiled()(model, tokens, positions, cache)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.tokens.copy_(tokens[:, None])
        self.positions.copy_(positions)
        self.graph.replay()
        return self.scores

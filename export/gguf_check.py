"""Compare a GGUF file with its checkpoint: weights, tokens, logits, greedy text, perplexity.

llama.cpp runs the file; the reference is our model in fp32. `verdict_of` applies the limits below.
"""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers

from data.chat.template import SHOWN
from data.tokenizers.bpe import load_tokenizer
from export.gguf import OUTTYPES
from export.gguf_plan import permute, plan_tensors
from inference.generation import generate
from inference.gguf_tokenizer import field, open_gguf
from inference.llamacpp import LlamaCpp
from models.hf import load_hf, read_hf_config
from models.nanollama import NanoLlama

WINDOW = 512  # tokens per independent window of text
MAX_ERROR = 0.02  # of a logit; times the logits' standard deviation if that exceeds 1
# Nats per token. llama.cpp rounds activations to the weights' type.
MAX_KL = {"f32": 1e-5, "f16": 1e-5, "bf16": 1e-4, "q8_0": 1e-3}
WRONG_FACTOR = 10  # times MAX_ERROR or MAX_KL: rounding cannot explain a larger error
# For a mixture of experts, the limits apply to the median token: if two experts have nearly equal
# scores, rounding may switch the expert, which changes that token's logits more than rounding does.
# Relative root mean square error of a tensor, by type. Normal weights have
# 0, 0.0002, 0.0017, 0.006, 0.02, 0.04, 0.04, 0.04 and 0.08.
MAX_WEIGHT_ERROR = {
    "F32": 0.0,
    "F16": 5e-4,
    "BF16": 3e-3,
    "Q8_0": 0.02,
    "Q6_K": 0.05,
    "Q5_K": 0.1,
    "Q5_1": 0.1,
    "Q5_0": 0.1,
    "Q4_K": 0.16,
}
EDGE_CASES = (  # for the tokenizer
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\n\n\n",
    "\t",
    " \n ",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\u0000",
    "\ufeff",
    "\u0301",
    "I'm you'LL they'Ve it's",
    "don\u2019t",
    "1234567890",
    "3.14159",
    "1,000,000",
    "\u0661\u0662\u0663",
    "x\u00b2",
    "\u00bd",
    "caf\u00e9",
    "cafe\u0301",
    "\u0130stanbul",
    "\u00df\u1e9e",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u3053\u3093\u306b\u3061\u306f",
    "\ud55c\uad6d\uc5b4",
    "\u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea",
    "\u2764\ufe0f",
    "\U0001d4d0",
    "def f(x):\n\treturn x**2\n",
    "<|im_start|>",
    "<|im_end|>x",
    " <|endoftext|> ",
    "<|pad|>",
    "<|im_end",
    "<|start_thought|>a<|end_thought|>",
    "<| im_end |>",
)


class Reference(NamedTuple):
    """The checkpoint's outputs."""

    folder: Path
    tokenizer: Tokenizer
    model: NanoLlama
    texts: list[str]  # to tokenize
    windows: list[list[int]]
    logits: list[torch.Tensor]  # per window [n, V]
    greedy: list[list[int]]  # greedy continuations of the windows' first `prompt` tokens
    prompt: int
    logit_std: float  # standard deviation of the logits


def reference(folder: Path, text: str, tokens: int, strings: int, new: int = 40) -> Reference:
    """Compute the checkpoint's outputs.

    text: real text; its first `tokens` tokens are scored. strings: tokenizer test strings. new:
    tokens of a greedy continuation.
    """
    tokenizer = load_tokenizer(folder)
    model = load_hf(folder)
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:tokens]
    size = min(WINDOW, model.config.max_position_embeddings - new)
    windows = [ids[i : i + size] for i in range(0, len(ids), size)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ValueError("the text has too few tokens to compare; give a longer text")
    with torch.no_grad():
        logits = [model(torch.tensor([window]))[0].float() for window in windows]
    prompt = min(32, len(windows[0]))
    greedy = [generate(model, [window[:prompt]], new)[0].tokens for window in windows[:4]]
    logit_std = float(torch.stack([scores.std(-1).mean() for scores in logits]).mean())
    return Reference(
        folder, tokenizer, model, fuzz(text, strings), windows, logits, greedy, prompt, logit_std
    )


def fuzz(text: str, count: int, seed: int = 0) -> list[str]:
    """Generate tokenizer test strings.

    Includes edge cases, spans of the text, random Unicode, digits, white space and bytes.
    """
    draw = random.Random(seed)
    pieces = [*EDGE_CASES, "a", "Z", "7", "_", "'s", "'RE", "--", "...", "\u2014", "$", "#!", "://"]
    blocks = [
        (32, 127),
        (128, 0x250),
        (0x370, 0x500),
        (0x590, 0x700),
        (0x900, 0xD00),
        (0x3040, 0x3100),
        (0x4E00, 0x9000),
    ]
    blocks += [
        (0xAC00, 0xD7A0),
        (0x2000, 0x2C00),
        (0x1F300, 0x1FB00),
        (1, 0xD800),
        (0xE000, 0x10FFFF),
    ]

    def random_string(kind: int) -> str:
        size = draw.randint(1, 40)
        if kind == 0:
            begin = draw.randrange(max(1, len(text) - size))
            return text[begin : begin + 4 * size]
        if kind == 1:
            return "".join(
                draw.choice(pieces) + draw.choice(("", "", " ", "\n", "  "))
                for _ in range(size // 3 + 1)
            )
        if kind == 2:
            block = draw.choice(blocks)
            return "".join(chr(draw.randrange(*block)) for _ in range(size))
        if kind == 3:
            return "".join(draw.choice("0123456789.,- \n\t\r'") for _ in range(size))
        if kind == 4:
            return draw.randbytes(size).decode(errors="replace")
        return "".join(chr(draw.randrange(*draw.choice(blocks))) for _ in range(size))

    return [*EDGE_CASES, *(random_string(i % 6) for i in range(count - len(EDGE_CASES)))][:count]


def compare_tokens(texts: Sequence[str], tokenizer: Tokenizer, runtime: LlamaCpp) -> dict[str, Any]:
    """Compare llama.cpp's tokenizer with ours.

    Texts are encoded as plain text and with special tokens; the latter are decoded again. Returns
    the number of strings, encoding mismatches, the first of them, and decoding mismatches.
    """
    shown = [token for token in SHOWN if tokenizer.token_to_id(token) is not None]
    # At a byte missing from the vocabulary, tokenizers merges the neighbours; llama.cpp does not.
    missing_bytes = {
        char for char in pre_tokenizers.ByteLevel.alphabet() if tokenizer.token_to_id(char) is None
    }
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    if missing_bytes:
        texts = [text for text in texts if not (text and missing_bytes & set(to_bytes(text)[0][0]))]
    mismatches, first, decoding_mismatches = 0, None, 0
    for special in (False, True):
        tokenizer.encode_special_tokens = not special
        for text, encoding in zip(
            texts, tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True
        ):
            if not special and any(token in text for token in shown):
                continue  # llama.cpp parses USER_DEFINED tokens in plain text too
            if runtime.encode(text, special) != encoding.ids:
                mismatches += 1
                first = first or text
            if special and encoding.ids:
                expected = tokenizer.decode(encoding.ids, skip_special_tokens=False)
                decoding_mismatches += runtime.decode(encoding.ids) != expected
    tokenizer.encode_special_tokens = False
    return {
        "strings": 2 * len(texts),
        "mismatches": mismatches,
        "first": first,
        "decoded_otherwise": decoding_mismatches,
        "bytes_lacking": len(missing_bytes),
    }


def weight_errors(folder: Path, reader: Any) -> dict[str, float]:
    """Return each tensor type's largest relative error from the checkpoint's weights.

    A missing tensor, or a wrong shape, ends the comparison: that name gets an infinite error.
    """
    import gguf

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    worst: dict[str, float] = {}
    for planned in plan_tensors(folder, read_hf_config(folder)):
        tensor = tensors.get(planned.name)
        # ggml lists dimensions from the last to the first.
        if tensor is None or tuple(map(int, tensor.shape[::-1])) != planned.stored.shape:
            return {**worst, planned.name: float("inf")}
        values = planned.stored.read()
        values = permute(values, planned.heads) if planned.heads else values
        dequantised = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        scale = max(float(np.sqrt(np.mean(values**2))), 1e-12)
        error = float(np.sqrt(np.mean((dequantised - values) ** 2)) / scale)
        worst[tensor.tensor_type.name] = max(worst.get(tensor.tensor_type.name, 0.0), error)
    return worst


def compare(path: Path, ref: Reference, threads: int = 0) -> dict[str, Any]:
    """Compare one file with the reference; ValueError if the file is unreadable."""
    reader = open_gguf(path)
    kind = str(field(reader, "general.file_type"))
    names = {str(number): name for name, number in _file_types()}
    row: dict[str, Any] = {
        "file": path.name,
        "outtype": names.get(kind, kind),
        "bytes": path.stat().st_size,
    }
    errors = weight_errors(ref.folder, reader)
    different = [name for name in errors if name.endswith(".weight")]  # a tensor, not a type
    if different:
        reason = f"it contains another model: {different[0]} is missing or has another shape"
        return {**row, "verdict": "wrong", "because": [reason]}
    row["weight_error"] = errors
    with LlamaCpp(path, max(map(len, ref.windows)) + len(ref.greedy[0]), threads) as runtime:
        row["tokenizer"] = compare_tokens(ref.texts, ref.tokenizer, runtime)
        ends = [field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        row["ends"] = all(index is not None and runtime.ends_reply(int(index)) for index in ends)
        row |= _compare_logits(ref, runtime)
        row["greedy"] = _compare_text(ref, runtime)
        row |= _speed(ref, runtime)
    row["verdict"], row["because"] = verdict_of(row, ref.logit_std)
    return row


def _compare_logits(ref: Reference, runtime: LlamaCpp) -> dict[str, Any]:
    """Compare logits, KL divergence, top-1 tokens and perplexity over the windows."""
    agree, nll, reference_nll, count = 0, 0.0, 0.0, 0
    errors, divergences = [], []  # of each token
    for window, expected in zip(ref.windows, ref.logits, strict=True):
        runtime.truncate()
        logits = torch.from_numpy(runtime.feed(window, last=len(window)))
        errors.append((logits - expected).abs().amax(-1))
        p, q = expected.log_softmax(-1), logits.log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
        agree += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        targets = torch.tensor(window[1:])[:, None]
        nll -= float(q[:-1].gather(-1, targets).sum())
        reference_nll -= float(p[:-1].gather(-1, targets).sum())
        count += len(window)
    scored = count - len(ref.windows)
    error, kl = torch.cat(errors), torch.cat(divergences).double()
    experts = ref.model.config.kind == "moe"
    medians = {"median_error": float(error.median()), "median_kl": float(kl.median())}
    return {
        "tokens": count,
        "max_error": float(error.max()),
        "kl": float(kl.sum()) / count,
        **(medians if experts else {}),
        "top1_agree": agree / count,
        "perplexity": float(np.exp(nll / scored)),
        "checkpoint_perplexity": float(np.exp(reference_nll / scored)),
    }


def _compare_text(ref: Reference, runtime: LlamaCpp) -> dict[str, Any]:
    """Compare greedy continuations.

    Returns the number of equal texts and the largest logit gap at a first differing token.
    """
    same, gap = 0, 0.0
    for window, expected in zip(ref.windows, ref.greedy, strict=False):
        runtime.truncate()
        token = int(runtime.feed(window[: ref.prompt]).argmax())
        for i, expected_token in enumerate(expected):
            if token != expected_token:
                ids = torch.tensor([[*window[: ref.prompt], *expected[:i]]])
                with torch.no_grad():
                    scores = ref.model(ids)[0, -1].float()
                gap = max(gap, float(scores[expected_token] - scores[token]))
                break
            token = int(runtime.feed([token]).argmax())
        else:
            same += 1
    return {"texts": len(ref.greedy), "same": same, "largest_gap": gap}


def _speed(ref: Reference, runtime: LlamaCpp) -> dict[str, float]:
    """Measure tokens per second of a prompt and of decoding."""
    runtime.truncate()
    start = time.perf_counter()
    runtime.feed(ref.windows[0])
    prompt = len(ref.windows[0]) / (time.perf_counter() - start)
    start = time.perf_counter()
    for token in ref.greedy[0]:
        runtime.feed([token])
    return {
        "prompt_tokens_per_s": prompt,
        "new_tokens_per_s": len(ref.greedy[0]) / (time.perf_counter() - start),
    }


def verdict_of(row: dict[str, Any], logit_std: float) -> tuple[str, list[str]]:
    """Return the verdict and its reasons.

    The verdict is "ok", "high" (over a limit, but rounding can explain it) or "wrong". Rounding may
    push the worst of about 100 million logits over its limit; an error also raises the mean KL.
    """
    wrong: list[str] = []
    high: list[str] = []
    for kind, error in row["weight_error"].items():
        if not error <= MAX_WEIGHT_ERROR.get(kind, 0.0):
            wrong.append(f"weights of type {kind} are off by {error:.2g}")
    if row["tokenizer"]["mismatches"]:
        wrong.append(
            f"{row['tokenizer']['mismatches']} texts are tokenized differently by llama.cpp, "
            f"such as {row['tokenizer']['first']!r}"
        )
    if not row["ends"]:
        wrong.append("llama.cpp does not end at eos and eot")
    exact = row["outtype"] in ("f32", "f16")
    allowed = MAX_ERROR * max(1.0, logit_std)
    limit = MAX_KL.get(row["outtype"])
    experts = "median_kl" in row
    error, kl = (
        (row["median_error"], row["median_kl"]) if experts else (row["max_error"], row["kl"])
    )
    if exact and not error < allowed:
        is_wrong = not (error < WRONG_FACTOR * allowed and limit is not None and kl < limit)
        (wrong if is_wrong else high).append(
            f"a logit is off by {error:.3g}, more than {allowed:.3g}"
        )
    if exact and not experts and row["greedy"]["largest_gap"] > 2 * allowed:
        wrong.append("greedy texts differ although the logits are not tied")
    if limit is not None and not kl < limit:
        is_wrong = exact or not kl < WRONG_FACTOR * limit
        (wrong if is_wrong else high).append(f"KL {kl:.2g} is above {limit:g}")
    if experts and limit is not None and not row["kl"] < WRONG_FACTOR * limit:
        (wrong if exact else high).append(
            f"the mean KL {row['kl']:.2g} is above {WRONG_FACTOR * limit:g}: many tokens use other "
            "experts"
        )
    return "wrong" if wrong else "high" if high else "ok", wrong + high


def _file_types() -> Iterator[tuple[str, int]]:
    import gguf

    for outtype, name in OUTTYPES.items():
        yield outtype, int(gguf.LlamaFileType[name])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the comparisons as a Markdown table."""
    head = (
        "file",
        "MB",
        "verdict",
        "max error",
        "KL",
        "top-1",
        "perplexity",
        "greedy",
        "tokens",
        "prompt tok/s",
        "new tok/s",
    )
    lines = [head, ("---",) * len(head)]
    for row in rows:
        if "kl" not in row:  # not run
            lines.append(
                (row["file"], f"{row['bytes'] / 1e6:.1f}", row["verdict"], *["-"] * (len(head) - 3))
            )
            continue
        greedy, tokens = row["greedy"], row["tokenizer"]
        lines.append(
            (
                row["file"],
                f"{row['bytes'] / 1e6:.1f}",
                row["verdict"],
                f"{row['max_error']:.2g}",
                f"{row['kl']:.2g}",
                f"{row['top1_agree']:.1%}",
                f"{row['perplexity']:.3f}",
                f"{greedy['same']} of {greedy['texts']}",
                f"{tokens['mismatches']} of {tokens['strings']:,} differ",
                f"{row['prompt_tokens_per_s']:.0f}",
                f"{row['new_tokens_per_s']:.1f}",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

"""Every attention kernel and its masks compared with softmax in double precision.

GPU kernels are compared on a GPU only. On a CPU, torch's varlen_attn runs on kernels in this file.
"""

import math
from functools import partial

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from models import attention, attention_cpu
from models.attention import (
    attend,
    attention_mask,
    block_mask,
    choose_kernel,
    dense_mask,
    varlen_mask,
)
from models.nanollama import ModelConfig, NanoLlama
from training.fsdp_utils import ParallelConfig, _keep_matmuls

CPU = torch.device("cpu")
HEADS = {"8 to 1": (8, 1), "8 to 2": (8, 2), "equal": (2, 2)}
GPU = ("sdpa", "flex", "varlen", "flash")


def ragged(rows: int, length: int) -> torch.Tensor:
    """Documents of 1 token, a few tokens, nearly a row; one starts at a row's last token."""
    doc_ids = torch.zeros(rows, length, dtype=torch.int32)
    for row, starts in enumerate(([1, 2, 9, length - 1], [length // 2 + 3], [])):
        if row < rows:
            doc_ids[row, starts] = 1
    return doc_ids.cumsum(1, dtype=torch.int32)


def example(
    heads: tuple[int, int],
    length: int,
    size: int = 16,
    rows: int = 3,
    dtype=torch.float32,
    device=CPU,
):
    """q, k, v in the model's memory layout [B, T, heads, size], and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, length, h, size) for h in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, grad = (
        torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2)
        for shape in shapes
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def exact(q, k, v, grad, doc_ids, window) -> list[torch.Tensor]:
    """Return output and gradients in double precision, from all scores and an explicit mask."""
    q, k, v = (x.detach().double().cpu().requires_grad_() for x in (q, k, v))
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    seen = torch.zeros(len(q), 1, length, length, dtype=torch.bool)
    for row in range(len(q)):
        for i in range(length):
            for j in range(max(0, i + 1 - (window or length)), i + 1):
                seen[row, 0, i, j] = doc_ids is None or doc_ids[row, i] == doc_ids[row, j]
    scores = (q @ k.repeat_interleave(group, 1).mT / math.sqrt(q.shape[3])).masked_fill(
        ~seen, -math.inf
    )
    out = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    return [out, *torch.autograd.grad(out, (q, k, v), grad.double().cpu())]


@pytest.fixture(scope="session")
def varlen_on_cpu():
    """Register CPU kernels for torch's variable-length attention: one document at a time."""
    from torch.nn.attention import varlen

    def documents(starts, longest, window, *tensors):
        """Yield each document's slice, masked scores and tensors [heads, tokens, size]."""
        assert starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(tensors[0])
        assert longest == starts.diff().max() and window[1] == 0
        for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            seen = dense_mask(None, end - begin, CPU, None if window[0] < 0 else window[0] + 1)
            yield slice(begin, end), ~seen, [x[begin:end].transpose(0, 1) for x in tensors]

    def softmax(q, k, hidden):
        scores = q @ k.repeat_interleave(len(q) // len(k), 0).mT / math.sqrt(q.shape[2])
        return scores.masked_fill(hidden, -math.inf).softmax(-1)

    @varlen._varlen_attn.register_kernel("cpu")
    def forward(
        q,
        k,
        v,
        starts,
        starts_k,
        longest,
        longest_k,
        causal=False,
        scale=None,
        window=None,
        gqa=False,
        *rest,
    ):
        calls.append(len(starts) - 1)
        out = torch.empty_like(q)
        for part, hidden, (q1, k1, v1) in documents(starts, longest, window, q, k, v):
            out[part] = (
                softmax(q1, k1, hidden) @ v1.repeat_interleave(len(q1) // len(v1), 0)
            ).transpose(0, 1)
        return out, q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        starts,
        starts_k,
        longest,
        longest_k,
        causal,
        rng,
        scale=None,
        window=None,
    ):
        of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part, hidden, (g, q1, k1, v1) in documents(starts, longest, window, grad, q, k, v):
            group, weights = len(q1) // len(k1), softmax(q1, k1, hidden)
            of_weights = g @ v1.repeat_interleave(group, 0).mT
            of_scores = (
                weights
                * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
                / math.sqrt(q.shape[2])
            )
            of_q[part] = (of_scores @ k1.repeat_interleave(group, 0)).transpose(0, 1)
            of_k[part] = (of_scores.mT @ q1).unflatten(0, (-1, group)).sum(1).transpose(0, 1)
            of_v[part] = (weights.mT @ g).unflatten(0, (-1, group)).sum(1).transpose(0, 1)
        return of_q, of_k, of_v

    attention._load_varlen("varlen")
    calls: list[int] = []
    return calls


def same(actual: list[torch.Tensor], expected: list[torch.Tensor], bound: float) -> None:
    for name, a, b in zip(("out", "q", "k", "v"), actual, expected, strict=True):
        assert a.shape == b.shape and (a.detach().double().cpu() - b).abs().max() <= bound * max(
            1.0, float(b.detach().abs().max())
        ), name


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("packed", [True, False], ids=["documents", "rows"])
@pytest.mark.parametrize("kernel", ["blocks", "fused", "math", "flex", "varlen"])
def test_output_and_gradients_equal_double_precision(
    kernel, packed, window, heads, varlen_on_cpu, monkeypatch
):
    length = 40
    doc_ids = ragged(3, length) if packed else None
    q, k, v, grad = example(heads, length)
    if kernel == "flex":
        # torch supports its backward pass on GPUs only.
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *qkv: None)
        mask = block_mask(doc_ids, length, CPU, window)
    elif kernel == "varlen":
        mask = varlen_mask(doc_ids, 3, length, CPU, window)
    elif kernel == "blocks":
        monkeypatch.setattr(attention_cpu, "BLOCK", 16)  # the last one is smaller
        mask = attention_mask(doc_ids, q.transpose(1, 2).flatten(2), "auto", window)
        assert isinstance(mask, attention.ScoreBias)
    else:
        mask = (
            attention_mask(doc_ids, q.transpose(1, 2).flatten(2), "sdpa", window)
            if kernel == "fused"
            else dense_mask(doc_ids, length, CPU, window)
        )
    with (
        sdpa_kernel(SDPBackend.MATH)
        if kernel == "math"
        else sdpa_kernel(list(SDPBackend.__members__.values()))
    ):
        out = attend(q, k, v, mask)
        actual = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    same(actual, exact(q, k, v, grad, doc_ids, window), 1e-5)


@pytest.mark.parametrize("packed", [True, False], ids=["documents", "rows"])
def test_blocks_in_bf16_are_as_near_to_double_precision_as_torchs_own_kernel(packed):
    length = 300
    doc_ids = ragged(3, length) if packed else None
    q, k, v, grad = example(HEADS["8 to 2"], length, 64, dtype=torch.bfloat16)
    expected, apart = [x.detach() for x in exact(q, k, v, grad, doc_ids, None)], {}
    for kernel in ("sdpa", "blocks"):
        out = attend(q, k, v, attention_mask(doc_ids, q.transpose(1, 2).flatten(2), kernel))
        actual = [out, *torch.autograd.grad(out, (q, k, v), grad)]
        apart[kernel] = [
            float((a.double() - b).detach().norm() / b.norm())
            for a, b in zip(actual, expected, strict=True)
        ]
    assert all(a < 2 * b < 2e-2 for a, b in zip(apart["blocks"], apart["sdpa"], strict=True)), apart


def test_blocks_give_way_where_they_would_keep_too_much(monkeypatch):
    x = torch.zeros(2, 8, 4)
    monkeypatch.setattr(attention, "MAX_PROBABILITIES", 2 * 8 * 8 * 4)
    assert isinstance(attention_mask(None, x), attention.ScoreBias)
    assert choose_kernel("auto", CPU, x.dtype, False, (2, 8, 4)) == "blocks"
    monkeypatch.setattr(attention, "MAX_PROBABILITIES", 2 * 8 * 8 * 4 - 1)
    assert attention_mask(None, x) is None and attention_mask(None, x, window=7).dtype == torch.bool
    assert choose_kernel("blocks", CPU, x.dtype, False, (2, 8, 4)) == "sdpa"  # and so it is logged


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run the tests on one")
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("packed", [True, False], ids=["documents", "rows"])
@pytest.mark.parametrize("kernel", GPU)
def test_on_a_gpu_output_and_gradients_equal_double_precision(kernel, packed, window, heads):
    device, length = torch.device("cuda"), 300
    doc_ids = ragged(3, length).to(device) if packed else None
    q, k, v, grad = example(heads, length, 64, dtype=torch.bfloat16, device=device)
    hidden = q.transpose(1, 2)
    try:
        mask = attention_mask(doc_ids, hidden, kernel, window)
    except ValueError as reason:
        pytest.skip(str(reason))
    out = attend(q, k, v, mask)
    actual = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    same(actual, exact(q, k, v, grad, None if doc_ids is None else doc_ids.cpu(), window), 2e-2)


@pytest.mark.parametrize("kernel, graphs", [("blocks", 1), ("flex", 1), ("varlen", 2)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_documents_of_any_number_do_not_compile_anew(
    kernel, graphs, checkpointed, varlen_on_cpu, monkeypatch
):
    """A block mask needs one graph; document starts need a second when their number changes."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *qkv: None)
    monkeypatch.setattr("models.attention_cpu.BLOCK", 40)
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
    )
    plain, compiled, compiled_graphs = NanoLlama(config, seed=0), NanoLlama(config, seed=0), []
    torch._dynamo.reset()

    def counting(graph, inputs):
        compiled_graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for i, layer in enumerate(compiled.layers):
        if checkpointed:
            keep = partial(create_selective_checkpoint_contexts, _keep_matmuls)
            compiled.layers[i] = layer = checkpoint_wrapper(layer, context_fn=keep)
        layer.compile(fullgraph=True, backend=counting)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(64, (2, 96), generator=generator)
        doc_ids = (torch.rand(2, 96, generator=generator) < 0.02 * (seed + 1)).int().cumsum(1)
        blocks = attention_mask(doc_ids, torch.empty(2, 96, 32), "blocks")
        of_documents = {
            "blocks": blocks,
            "flex": block_mask(doc_ids, 96, CPU),
            "varlen": varlen_mask(doc_ids, 2, 96, CPU),
        }[kernel]
        gradients = []
        for model, mask in ((plain, dense_mask(doc_ids, 96, CPU)), (compiled, of_documents)):
            monkeypatch.setattr("models.nanollama.attention_mask", lambda *args, mask=mask: mask)
            model.zero_grad()
            varlen_on_cpu.clear()
            losses = model(tokens, tokens.roll(-1, 1), doc_ids)
            losses.nll.sum().backward()
            gradients.append([losses.nll, *(parameter.grad for parameter in model.parameters())])
        # Once per layer: its output was saved for backward.
        assert len(varlen_on_cpu) == (2 if kernel == "varlen" else 0)
        for a, b in zip(*gradients, strict=True):
            assert (a - b).abs().max() <= 1e-4 * max(1.0, float(a.detach().abs().max()))
    assert len(compiled_graphs) == graphs


def test_starts_of_documents():
    doc_ids = torch.tensor([[0, 0, 1, 2], [0, 0, 0, 0], [5, 5, 6, 6]])
    mask = varlen_mask(doc_ids, 3, 4, CPU)
    assert (
        mask.starts.tolist() == [0, 2, 3, 4, 8, 10, 12]
        and mask.longest == 4
        and mask.window == (-1, 0)
    )
    rows = varlen_mask(None, 3, 4, CPU, window=3)
    assert rows.starts.tolist() == [0, 4, 8, 12] and rows.longest == 4 and rows.window == (2, 0)


def test_a_window_as_long_as_the_row_is_none():
    x = torch.zeros(1, 8, 4)
    assert (
        attention_mask(None, x, "sdpa", window=8) is None
        and attention_mask(None, x, "sdpa", window=7) is not None
    )


def test_the_kernel_that_is_chosen_and_the_sentence_where_there_is_none(monkeypatch):
    cuda, bf16, fp32 = torch.device("cuda"), torch.bfloat16, torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_flash_version", lambda device: None)
    chosen = partial(choose_kernel, "auto")
    assert [chosen(CPU, bf16, True), chosen(CPU, fp32, False), chosen(cuda, bf16, False)] == [
        "blocks",
        "blocks",
        "sdpa",
    ]
    assert chosen(cuda, bf16, True) == chosen(cuda, fp32, True) == "flex"
    assert choose_kernel("varlen", cuda, bf16, True) == "varlen"
    for kernel, device, dtype, sentence in (
        (
            "varlen",
            CPU,
            bf16,
            "attention=varlen trains on an NVIDIA GPU only, not on cpu; set parallel.attention=",
        ),
        ("flex", CPU, fp32, "attention=flex trains on an NVIDIA GPU only"),
        ("varlen", cuda, fp32, "computes in bfloat16 only, not float32"),
        ("blocks", cuda, bf16, "attention=blocks runs on a CPU only, not on cuda"),
        ("sdpa", cuda, bf16, "would store a score for each pair"),
        ("flash", cuda, bf16, "needs the package flash_attn"),
    ):
        with pytest.raises(ValueError, match=sentence):
            choose_kernel(kernel, device, dtype, masked=True)
    monkeypatch.setattr(attention, "_flash_version", lambda device: "FA3")
    assert choose_kernel("flash", cuda, bf16, True) == "FA3"
    with pytest.raises(
        ValueError,
        match=r"parallel.attention='fast' is not one of auto, sdpa, blocks, flex, varlen, flash",
    ):
        ParallelConfig(attention="fast")

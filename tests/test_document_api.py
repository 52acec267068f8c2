"""The short forms of docs/api.md give the results of the code that training uses."""

import sys

import forked
import numpy as np
import pytest
import torch
from conftest import one_thread
from pyarrow import parquet

from data.dataloader import PackedDataLoader
from data.packing import StreamRows
from data.pipeline.recipe import Split
from data.shards import TokenShards
from data.tokenizers.bpe import load_tokenizer
from models.losses import compute_loss_with_z_penalty, token_loss_sum, token_losses
from models.nanollama import ModelConfig, NanoLlama
from scripts.decontaminate import find_contaminated_examples
from training.schedulers import ScheduleConfig, WSDScheduler

TINY = {"vocab_size": 97, "n_layers": 2, "hidden_dim": 48, "n_heads": 4, "n_kv_heads": 2}


def test_a_model_from_its_shape_by_any_name():
    with torch.device("meta"):
        model = NanoLlama(
            vocab_size=32000,
            n_layers=22,
            hidden_dim=2048,
            n_heads=32,
            n_kv_heads=4,
            max_seq_len=4096,
            rope_theta=10000.0,
        )
    assert model.config == ModelConfig()
    by_own_names = NanoLlama(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    first = NanoLlama(**TINY)
    assert first.config == by_own_names.config and first.config.intermediate_size == 256
    again = NanoLlama(first.config, seed=0).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.state_dict().items())
    assert NanoLlama(**TINY, ffn_dim=64).config.intermediate_size == 64
    with pytest.raises(TypeError, match="n_experts is not a field of ModelConfig"):
        NanoLlama(n_experts=8)
    with pytest.raises(TypeError, match="hidden_dim is given twice"):
        NanoLlama(hidden_size=48, hidden_dim=48)
    with pytest.raises(TypeError, match="give a config or n_layers, not both"):
        NanoLlama(ModelConfig(), n_layers=3)


def test_the_loss_of_logits_equals_the_chunked_heads():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 16), torch.randn(50, 16)
    labels = torch.randint(50, (2, 9))
    labels[0, :4] = -100
    gradients = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            loss = token_loss_sum(token_losses(h, w, labels, chunk=4), 1e-4)[0] / 14
        else:
            loss = compute_loss_with_z_penalty(h @ w.T, labels)
        loss.backward()
        gradients.append((loss.detach(), h.grad, w.grad))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)
    plain = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    logsumexp = (hidden @ weight.T).logsumexp(-1)[labels != -100]
    z = 1e-4 * logsumexp.square().mean()
    assert z > 1e-4 and torch.allclose(gradients[1][0], plain + z, atol=1e-6)
    assert compute_loss_with_z_penalty(hidden @ weight.T, torch.full((2, 9), -100)) == 0
    with pytest.raises(ValueError, match=r"need labels of shape \[2, 9\], not \[9, 2\]"):
        compute_loss_with_z_penalty(hidden @ weight.T, labels.T)


def test_a_model_is_wrapped_without_a_process_group():
    code = """
import torch
from models.nanollama import NanoLlama
from training.fsdp_utils import wrap_model_fsdp
shape = dict(vocab_size=97, n_layers=2, hidden_dim=48, n_heads=4, n_kv_heads=2)
model = wrap_model_fsdp(NanoLlama(**shape))
tokens = torch.arange(12)[None] + 0
wrapped, plain = model(tokens).float(), NanoLlama(**shape)(tokens)
assert (wrapped - plain).abs().max() < 0.02, (wrapped - plain).abs().max()
model(tokens, tokens).nll.sum().backward()
assert all(parameter.grad is not None for parameter in model.parameters())
print(type(model).__name__, torch.distributed.get_world_size())
"""
    alone = forked.run([sys.executable, "-c", code], env=one_thread())
    assert alone.stdout == "FSDPNanoLlama 1\n", alone.stderr


def test_packed_texts_equal_the_rows_of_a_store(text_store):
    split = Split(0.1)
    table = parquet.read_table(text_store / "documents" / "first" / "00000.parquet").to_pylist()
    rows = [row for row in table if split.of(row["id"]) == "train"]
    tokenizer = load_tokenizer(text_store / "tokenizer")
    stored = StreamRows(TokenShards(text_store / "tokens" / "first", "train"), 64)
    loader = PackedDataLoader(rows, tokenizer, 64, 4)
    batches = list(loader)
    assert len(batches) == len(stored) // 4 > 100
    tokens, targets, doc_ids = (np.empty(64, np.int64) for _ in range(3))
    for number in range(4 * len(batches)):
        stored.fill(number, tokens, targets, doc_ids)
        batch = batches[number // 4]
        assert (batch.tokens[number % 4].numpy() == tokens).all()
        assert (batch.targets[number % 4].numpy() == targets).all()
        assert (batch.doc_ids[number % 4].numpy() == doc_ids).all()
    # A second iteration starts again.
    assert torch.equal(next(iter(loader)).tokens, batches[0].tokens)


def test_packed_texts_with_a_tokenizer_of_transformers(text_store):
    from transformers import AutoTokenizer

    texts = ["One text.", "Another text, <|endoftext|> a little longer.", "", "The last."] * 5
    by_hf = AutoTokenizer.from_pretrained(text_store / "tokenizer")
    ours = load_tokenizer(text_store / "tokenizer")
    named = PackedDataLoader(dataset=texts, tokenizer=by_hf, seq_len=8, batch_size=2)
    pairs = zip(named, PackedDataLoader(iter(texts), ours, 8, 2), strict=True)
    assert all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))
    with pytest.raises(ValueError, match="seq_len=0 and batch_size=2 must be at least 1"):
        PackedDataLoader(texts, ours, 0, 2)
    for dataset in ("a b c", {"text": "a b c"}, {"train": [{"text": "a"}]}):
        with pytest.raises(ValueError, match=r"takes texts or rows, not a (str|dict); put"):
            PackedDataLoader(dataset, ours, 8, 2)
    for rows, message in (
        (["a b c"], r"the texts have \d tokens, but a batch of 2 rows of 8 needs 17; add texts"),
        ([{"content": "a"}], "a row has no text under 'text'; it has content"),
        ([["a", "b"]], "a text is a list; give texts, or rows with a 'text'"),
    ):
        with pytest.raises(ValueError, match=message):
            list(PackedDataLoader(rows, ours, 8, 2))


def test_a_schedule_that_sets_the_rates_of_an_optimizer():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1e-2, 1e-3)]
    optimizer = torch.optim.AdamW(groups)
    schedule = WSDScheduler(optimizer, warmup_steps=3, stable_steps=4, decay_steps=5, min_lr=1e-4)
    pure = [WSDScheduler(ScheduleConfig(3, 12, 5, "linear", 1e-4), lr) for lr in (1e-2, 1e-3)]
    seen = []
    for _ in range(14):
        seen.append([group["lr"] for group in optimizer.param_groups])
        assert schedule.get_last_lr() == seen[-1]
        optimizer.step()
        schedule.step()
    assert seen == [[rate(step) for rate in pure] for step in range(14)]
    assert seen[3][0] == 1e-2 and seen[11][0] == seen[13][0] == 1e-4
    scheduler = WSDScheduler(optimizer=optimizer, warmup_steps=3, stable_steps=4, decay_steps=5)
    scheduler.load_state_dict({**schedule.state_dict(), "last_epoch": 5})
    assert scheduler.get_last_lr() == [1e-2, 1e-3]  # the peak rates do not change
    with pytest.raises(ValueError, match=r"schedule.min_lr=0.1 is above optim.lr=0.01"):
        WSDScheduler(torch.optim.AdamW(groups, lr=1.0), 3, 4, 5, min_lr=0.1)


def test_contaminated_examples_are_found_by_the_real_rules():
    item = (
        "A farmer has seventeen sheep and buys thirty more at the market, then sells nine of "
        "them to his neighbour; how many sheep does the farmer keep in the end?"
    )
    changed = item.replace("neighbour", "cousin").replace("market", "fair")
    clean = "The library opens at nine and closes at six, and on Sundays it stays closed all day."
    assert find_contaminated_examples([clean, f"Before. {item} After.", changed], [item]) == {1, 2}
    named = {"a": clean, "b": clean + item}
    assert find_contaminated_examples(named, [item, "short"]) == {"b"}
    rows = [{"text": clean}, {"text": clean + item}]
    assert find_contaminated_examples(rows, {"t": item}) == {1}
    assert find_contaminated_examples(rows, [{"text": item}]) == {1}
    assert find_contaminated_examples(rows, rows) == {0, 1}
    for texts, tests in (([{"content": clean}], [item]), ([clean], [{"question": item}])):
        with pytest.raises(ValueError, match="a row has no text under 'text'; it has "):
            find_contaminated_examples(texts, tests)
    with pytest.raises(ValueError, match="put a single text in a list"):
        find_contaminated_examples([clean], item)
    assert find_contaminated_examples((text for text in [clean]), [item]) == set()
    with pytest.raises(ValueError, match="the test sets have no items"):
        find_contaminated_examples([clean], [])

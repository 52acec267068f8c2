"""Cached logits compared with the plain forward pass, generation with transformers."""

import json

import pytest
import torch
from test_model import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference import kv_cache
from inference.generation import generate
from inference.kv_cache import Cache, forward, logits
from inference.packed_weights import linear_ops
from inference.sampling import Sampling, process_logits, sample, uniforms
from inference.streaming import TextStream, complete, stream_text
from models.hf import load_hf, save_hf
from models.losses import token_losses
from models.nanollama import NanoLlama

TOKENS = torch.randint(97, (4, 40), generator=torch.Generator().manual_seed(5))
VARIANTS = [{}, {"qk_norm": True, "tie_word_embeddings": True}, {"head_dim": 16}]


def read(
    model: NanoLlama, cache: Cache, rows: list[int], width: int, counts: list[int] | None = None
) -> float:
    """Continue each row of the cache in TOKENS; return the largest error of a valid logit."""
    starts = cache.lengths
    chunk = torch.stack(
        [TOKENS[row, start : start + width] for row, start in zip(rows, starts, strict=True)]
    )
    out, exact = logits(model, forward(model, chunk, cache, counts)), model(TOKENS).detach()
    counts = counts or [width] * len(rows)
    assert cache.lengths == [start + count for start, count in zip(starts, counts, strict=True)]
    parts = zip(range(len(rows)), rows, starts, counts, strict=True)
    return max(float((out[i, :n] - exact[row, at : at + n]).abs().max()) for i, row, at, n in parts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_logits_are_those_of_the_plain_forward(variant):
    model = tiny(**variant)
    cache = Cache(model.config, 4, 40)
    assert all(read(model, cache, [0, 1, 2, 3], width) <= 1e-5 for width in (9, 1, 1, 5, 1, 17, 6))
    ragged = Cache(model.config, 4, 40)
    assert read(model, ragged, [0, 1, 2, 3], 13, [5, 13, 1, 9]) <= 1e-5
    assert read(model, ragged, [0, 1, 2, 3], 1) <= 1e-5
    assert read(model, ragged, [0, 1, 2, 3], 7, [7, 3, 7, 4]) <= 1e-5
    some = ragged.select([2, 0, 2], length=30)
    assert all(read(model, some, [2, 0, 2], width) <= 1e-5 for width in (1, 4, 1))
    assert read(model, ragged, [0, 1, 2, 3], 1) <= 1e-5  # copying from the cache did not change it


def test_continuations_of_a_shared_prefix_score_as_whole_texts_do():
    model = tiny(max_position_embeddings=40)
    cache, counts = Cache(model.config, 1, 25), [3, 15, 8, 1]
    texts = torch.cat((TOKENS[:1, :25].expand(4, -1), TOKENS[:, 25:]), dim=1)
    forward(model, texts[:1, :25], cache)
    hidden = forward(model, texts[:, 25:-1], cache.expand(4, length=40), counts)
    scores = token_losses(hidden, model.lm_head.weight, texts[:, 26:]).nll
    exact = model(texts[:, :-1], texts[:, 1:]).nll[:, 25:]
    for row, count in enumerate(counts):
        assert (scores[row, :count] - exact[row, :count]).abs().max() <= 1e-5


def test_what_does_not_fit_is_refused():
    model = tiny(max_position_embeddings=40)
    with pytest.raises(ValueError, match="41 tokens exceed the model's context of 40"):
        Cache(model.config, 1, 41)
    cache = Cache(model.config, 1, 10)
    forward(model, TOKENS[:1, :8], cache)
    with pytest.raises(ValueError, match="room for 10 tokens, not for 11"):
        forward(model, TOKENS[:1, :3], cache)
    with pytest.raises(ValueError, match="a cache of length 7 is too short for rows of 8"):
        cache.expand(3, length=7)
    with pytest.raises(ValueError, match="expand needs a cache of one row"):
        cache.expand(3).expand(2)
    with pytest.raises(ValueError, match="2 rows of tokens"):
        forward(model, TOKENS[:2, :1], cache)


PROMPTS = [[5, 9, 33], [7], [60, 2, 2, 2, 81, 40, 3, 9, 12], [7, 90]]


@pytest.fixture(scope="module", params=VARIANTS[:2], ids=["llama", "qwen3, tied"])
def models(request, tmp_path_factory):
    """The same folder read by us and by transformers."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny(**request.param)
    save_hf(folder, model.config, model.state_dict(), torch.float32)
    return load_hf(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def by_transformers(model, prompts: list[list[int]], new: int, **options) -> list[list[int]]:
    """Return transformers' completion of each left-padded prompt, up to the stop token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        pad_token_id=0,
        **{"do_sample": False, **options},
    )
    rows = out[:, width:].tolist()
    stops = options.get("eos_token_id", [])
    ends = [next((at + 1 for at, token in enumerate(row) if token in stops), new) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def test_greedy_tokens_are_those_of_transformers(models):
    model, reference = models
    expected = by_transformers(reference, PROMPTS, 50)
    assert [row.tokens for row in generate(model, PROMPTS, 50)] == expected
    assert [generate(model, [prompt], 50)[0].tokens for prompt in PROMPTS] == expected
    stops = [expected[0][7], expected[2][20]]
    stopped = generate(model, PROMPTS, 50, stop_tokens=stops)
    assert [row.tokens for row in stopped] == by_transformers(
        reference, PROMPTS, 50, eos_token_id=stops
    )
    assert [row.finish for row in stopped] == [
        "stop" if row.tokens[-1] in stops else "length" for row in stopped
    ]
    assert len({len(row.tokens) for row in stopped}) > 1  # finished rows were removed
    penalised = [
        row.tokens
        for row in generate(model, PROMPTS[:1], 50, sampling=Sampling(repetition_penalty=1.3))
    ]
    assert (
        penalised
        == by_transformers(reference, PROMPTS[:1], 50, repetition_penalty=1.3)
        != expected[:1]
    )


def test_a_prefix_in_the_cache_changes_nothing(models):
    model, _ = models
    expected = [row.tokens for row in generate(model, PROMPTS, 20)]
    prefix, prompts = PROMPTS[2][:6], [PROMPTS[2][6:], [8], [9, 9, 9, 9]]
    cache = Cache(model.config, 1, 6)
    forward(model, torch.tensor([prefix]), cache)
    uncached = [row.tokens for row in generate(model, [prefix + prompt for prompt in prompts], 20)]
    assert [
        row.tokens for row in generate(model, prompts, 20, cache=cache.expand(3, length=40))
    ] == uncached
    chat, first = Cache(model.config, 1, 60), PROMPTS[2]
    reply = generate(model, [first], 20, cache=chat)[0].tokens
    assert reply == expected[2]
    again = generate(model, [[reply[-1], 4, 5]], 20, cache=chat)[0].tokens
    assert again == generate(model, [[*first, *reply, 4, 5]], 20)[0].tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_packed_matrices_give_the_same_products(dtype, rows):
    model = tiny()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    ours, exact = linear_ops(model, rows), linear_ops(model)
    generator = torch.Generator().manual_seed(1)
    sizes = {
        "qkv": model.config.hidden_size,
        "out": model.config.num_attention_heads * model.config.resolved_head_dim,
    }
    sizes["feed_forward"] = model.config.hidden_size
    for layer, plainly in zip(ours.layers, exact.layers, strict=True):
        for name, size in sizes.items():
            x = torch.randn(rows, size, generator=generator).to(dtype)
            actual, expected = getattr(layer, name)(x), getattr(plainly, name)(x)
            assert actual.shape == expected.shape and actual.dtype == dtype
            assert (actual - expected).abs().max() <= (
                1e-5 if dtype == torch.float32 else 2**-7 * expected.abs().max()
            )


def test_packed_matrices_follow_the_weights(monkeypatch):
    model, copy = tiny(), tiny()
    first = [row.tokens for row in generate(model, PROMPTS, 20)]
    # Weights for many rows also serve one.
    assert linear_ops(model, 4) is linear_ops(model, 4) is linear_ops(model, 1)
    with torch.no_grad():
        for one, two in zip(model.parameters(), copy.parameters(), strict=True):
            one.mul_(1.3)
            two.data = 1.3 * two
    changed = [row.tokens for row in generate(model, PROMPTS, 20)]
    assert changed == [row.tokens for row in generate(copy, PROMPTS, 20)] != first
    for parameter in model.parameters():
        parameter.data.div_(1.3)  # which autograd does not count
    assert [row.tokens for row in generate(model, PROMPTS, 20)] == first
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert [
        row.tokens for row in generate(tiny(), PROMPTS, 20)
    ] == first  # plain layers without oneDNN


def test_the_compiled_step_is_one_graph_and_changes_nothing(monkeypatch):
    compiled = torch.compile(kv_cache._decode, backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(kv_cache, "_compiled_decode", lambda: compiled)
    model = tiny(num_hidden_layers=1)
    for options in ({}, {"stop_tokens": range(20)}):  # the second time with rows that end early
        plain = generate(model, PROMPTS, 20, **options)
        assert generate(model, PROMPTS, 20, compile=True, **options) == plain


def test_log_probabilities_are_those_of_the_model(models):
    model, reference = models
    for prompt, row in zip(
        PROMPTS,
        generate(model, PROMPTS, 12, sampling=Sampling(temperature=0.8), logprobs=True),
        strict=True,
    ):
        ids = torch.tensor([prompt + row.tokens])
        exact = (
            reference(ids)
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)
            .gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
        )
        assert (torch.tensor(row.logprobs) - exact).abs().max() <= 1e-5


SCORES = 4 * torch.randn(6, 97, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "warper"),
    [
        ("temperature", TemperatureLogitsWarper(0.6)),
        ("top_k", TopKLogitsWarper(7)),
        ("top_p", TopPLogitsWarper(0.8)),
        ("top_p", TopPLogitsWarper(0.01)),
        ("min_p", MinPLogitsWarper(0.05)),
    ],
)
def test_transforms_are_those_of_transformers(name, warper):
    sampling = Sampling(**{"temperature": 1.0, name: getattr(warper, name)})
    ours, theirs = (
        process_logits(SCORES, sampling),
        warper(torch.zeros(6, 1, dtype=torch.int64), SCORES),
    )
    assert torch.equal(ours, theirs) and not torch.equal(ours, SCORES)


def test_all_transforms_together_are_those_of_transformers(models):
    _, reference = models
    history = torch.randint(97, (6, 9), generator=torch.Generator().manual_seed(2))
    options = {
        "repetition_penalty": 1.4,
        "temperature": 1.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
    }
    processors = reference._get_logits_processor(
        GenerationConfig(**options, do_sample=True), history.shape[1]
    )
    seen = torch.zeros(6, 97, dtype=torch.bool).scatter_(1, history, True)
    assert torch.equal(
        process_logits(SCORES, Sampling(**options), seen), processors(history, SCORES)
    )


def test_draws_follow_the_distribution_and_the_seed_of_their_row(models):
    scores = SCORES[:1].expand(200_000, -1)
    tokens = sample(scores, uniforms([0], 200_000)[0])
    shares = torch.bincount(tokens, minlength=97) / 200_000
    assert (
        shares - SCORES[0].softmax(0)
    ).abs().max() <= 4 * 0.5 / 200_000**0.5  # four deviations of a share of a half
    masked = process_logits(SCORES, Sampling(temperature=1.0, top_k=2))
    for chance in (0.0, 0.5, 1 - 2**-53):  # the ends of the range fall on tokens that are left
        assert (
            masked.gather(1, sample(masked, torch.full((6,), chance, dtype=torch.float64))[:, None])
            .isfinite()
            .all()
        )
    model, _ = models
    sampling = Sampling(temperature=1.0, top_p=0.95)
    together = [
        row.tokens for row in generate(model, PROMPTS, 15, sampling=sampling, seed=[3, 4, 5, 6])
    ]
    assert together == [
        row.tokens for row in generate(model, PROMPTS, 15, sampling=sampling, seed=3)
    ]
    alone = [
        generate(model, [prompt], 15, sampling=sampling, seed=3 + i)[0].tokens
        for i, prompt in enumerate(PROMPTS)
    ]
    assert (
        together
        == alone
        != [row.tokens for row in generate(model, PROMPTS, 15, sampling=sampling, seed=7)]
    )


def letters(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("stops", [[], ["zz"], ["é!", "é?"], ["\U0001f600 "], ["ab", "xabcd"]])
def test_streamed_text_is_whole_and_ends_before_a_stop_string(stops):
    text = "xabxabcé\U0001f600\U0001f600 é?z ü"
    texts = TextStream(letters, stops)
    pieces = [texts.push(byte) for byte in text.encode()]
    pieces.append(texts.flush())
    ends = [text.find(stop) for stop in stops if stop in text]
    assert "".join(pieces) == text[: min(ends, default=len(text))]
    assert texts.stopped == bool(ends) and not any("\ufffd" in piece for piece in pieces)
    cut = TextStream(letters)
    assert cut.push(195) == "" and cut.flush() == "\ufffd"  # half a character at the very end


def test_text_of_rows_stops_at_strings_and_tokens(models):
    model, _ = models
    alphabet = [chr(0x4E00 + i) for i in range(97)]

    def decode(tokens):
        return "".join(alphabet[token] for token in tokens)

    plain = complete(model, PROMPTS, 30, decode)
    assert plain == [decode(row.tokens) for row in generate(model, PROMPTS, 30)]
    stop = plain[1][4:6]
    for text, full_text in zip(
        complete(model, PROMPTS, 30, decode, stop_strings=[stop]), plain, strict=True
    ):
        assert text == full_text.split(stop)[0]
    token = alphabet.index(plain[0][9])
    for text, full_text in zip(
        complete(model, PROMPTS, 30, decode, stop_tokens=[token]), plain, strict=True
    ):
        assert text == full_text.split(alphabet[token])[0]
    rows = dict.fromkeys(range(len(PROMPTS)), "")
    for row, piece in stream_text(model, PROMPTS, 30, decode):
        rows[row] += piece
        assert len(piece) == 1
    assert list(rows.values()) == plain


def test_a_row_is_held_to_its_grammar_and_no_other(text_store):
    pytest.importorskip("xgrammar")
    from inference.grammar import JsonGrammar

    tokenizer = AutoTokenizer.from_pretrained(text_store / "tokenizer")
    # More rows than the tokenizer has tokens.
    model = tiny(vocab_size=400, max_position_embeddings=400)
    schema = {
        "type": "object",
        "properties": {
            "name": {"enum": ["add", "find"]},
            "text": {"type": "string", "maxLength": 12},
            "on": {"type": "boolean"},
        },
        "required": ["name", "text", "on"],
        "additionalProperties": False,
    }
    grammar = JsonGrammar(schema, tokenizer, 400)
    start, end = 7, 1
    prompts = [[5, 6], [9, start], [5, 6], [8]]
    sampling = Sampling(temperature=1.5)
    constraints = [
        grammar.constraint(followers=end),
        None,
        None,
        grammar.constraint(marker=start, followers=end),
    ]
    rows = generate(model, prompts, 120, sampling=sampling, constraints=constraints, logprobs=True)
    free = generate(model, prompts, 120, sampling=sampling)
    written = rows[0].tokens[: rows[0].tokens.index(end)]
    value = json.loads(tokenizer.decode(written))
    assert (
        value["name"] in ("add", "find")
        and len(value["text"]) <= 12
        and isinstance(value["on"], bool)
    )
    assert rows[1].tokens == free[1].tokens and rows[2].tokens == free[2].tokens
    with pytest.raises(json.JSONDecodeError):
        json.loads(tokenizer.decode(free[0].tokens[: len(written)]))
    triggered = generate(
        model, [[8]], 60, constraints=[Once(start, grammar.constraint(marker=start, followers=end))]
    )[0].tokens
    start_index = triggered.index(start)
    assert json.loads(
        tokenizer.decode(triggered[start_index + 1 : triggered.index(end, start_index)])
    )["name"] in (
        "add",
        "find",
    )


class Once:
    """Forces `token` as the third token; another constraint controls the others."""

    def __init__(self, token, constraint):
        self.token, self.other, self.count = token, constraint, 0

    def mask(self, scores):
        if self.count == 2:
            scores[self.token] = 1e9
        self.other.mask(scores)

    def accept(self, token):
        self.count += 1
        self.other.accept(token)


def test_mistakes_are_named():
    model = tiny()
    for options, words in [
        ({"prompts": [[1], []]}, "at least one token"),
        ({"prompts": [[1, 97]]}, "token 97 is not in the model's vocabulary of 97"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "must be at least 1"),
        ({"prompts": [[1]], "max_new_tokens": 65}, "65 tokens exceed the model's context of 64"),
        ({"prompts": [[1, 2]], "cache": Cache(model.config, 1, 5)}, "room for 5 tokens, not for 6"),
        ({"prompts": [[1], [2]], "cache": Cache(model.config, 1, 9)}, "2 prompts do not fit"),
    ]:
        with pytest.raises(ValueError, match=words):
            generate(model, **{"max_new_tokens": 5, **options})
    for options in (
        {"temperature": -1},
        {"top_p": 0.0},
        {"top_k": -2},
        {"min_p": 2.0},
        {"repetition_penalty": 0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            Sampling(**options)
    with pytest.raises(ValueError, match="stop string"):
        TextStream(letters, [""])

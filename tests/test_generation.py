"""The cache against the plain forward, generation against transformers."""

import pytest
import torch
from test_model import tiny

from models.generation import Cache, forward, logits
from models.losses import token_losses
from models.nanollama import NanoLlama

TOKENS = torch.randint(97, (4, 40), generator=torch.Generator().manual_seed(5))
VARIANTS = [{}, {"qk_norm": True, "tie_word_embeddings": True}, {"head_dim": 16}]


def read(model: NanoLlama, cache: Cache, rows: list[int], width: int, counts: list[int] | None = None) -> float:
    """Let each row of the cache read on in its row of TOKENS; the largest error of a logit that counts."""
    starts = cache.lengths
    chunk = torch.stack([TOKENS[row, start : start + width] for row, start in zip(rows, starts, strict=True)])
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
    assert read(model, ragged, [0, 1, 2, 3], 1) <= 1e-5  # what was copied out of it did not change it


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
    with pytest.raises(ValueError, match="a cache for 7 tokens cannot take rows of 8"):
        cache.expand(3, length=7)
    with pytest.raises(ValueError, match="only a cache of one row expands"):
        cache.expand(3).expand(2)
    with pytest.raises(ValueError, match="2 rows of tokens"):
        forward(model, TOKENS[:2, :1], cache)

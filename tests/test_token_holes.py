"""Base models with gaps in their token ids: new tokens follow the largest id.

Only the embedding rows of the new tokens change.
"""

import json

import pytest
import torch
from tokenizers import Tokenizer

from data.chat.rendering import CHAT_TOKENS, Chat
from data.chat.tokenizer import save_chat_tokenizer
from data.tokenizers.bpe import load_tokenizer, token_bytes, train_tokenizer, vocabulary_size
from inference.gguf_tokenizer import NORMAL, UNUSED, build_tokenizer, read_vocabulary
from models.hf import load_weights, save_hf
from models.nanollama import ModelConfig, NanoLlama
from training import setup
from training.fine_tuning import open_base
from training.reference import build_reference


def tokenizer_with(change) -> str:
    content = json.loads(train_tokenizer(["a b c"], 258).to_str())
    change(content)
    return json.dumps(content)


def added(index: int, text: str) -> dict:
    return {
        "id": index,
        "content": text,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        "special": True,
    }


def hole_in_vocabulary(content: dict) -> None:
    """Ids 0 to 257 and 259: the tokenizers library would assign 259 again."""
    content["model"]["vocab"]["zz"] = 259


def hole_in_added_tokens(content: dict) -> None:
    content["added_tokens"] += [added(262, "<|one|>"), added(270, "<|two|>")]


def hole_in_both(content: dict) -> None:
    content["model"]["vocab"] |= {"<|one|>": 262, "zz": 261}
    content["added_tokens"] += [added(262, "<|one|>")]


CASES = {
    "vocabulary": (hole_in_vocabulary, {"zz": 259}),
    "added tokens": (hole_in_added_tokens, {"<|one|>": 262, "<|two|>": 270}),
    "both": (hole_in_both, {"<|one|>": 262, "zz": 261}),
}


@pytest.fixture(
    params=[(name, padded) for name in CASES for padded in (0, 30)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def base(request, tmp_path):
    """(folder, token ids, model); padded: embedding rows after the largest id."""
    name, padded = request.param
    change, ids = CASES[name]
    folder = tmp_path / "base"
    config = ModelConfig(
        max(ids.values()) + 1 + padded, 32, 64, 1, 2, 2, max_position_embeddings=4096
    )
    model = NanoLlama(config, seed=0)
    save_hf(folder, config, model.state_dict(), torch.float32)
    (folder / "tokenizer.json").write_text(tokenizer_with(change), encoding="utf-8")
    return folder, ids, model


def test_new_tokens_come_after_the_largest_id_and_only_their_rows_are_set(base, tmp_path):
    from train_sft import SFTConfig

    folder, ids, model = base
    size = max(ids.values()) + 1
    assert (
        vocabulary_size(load_tokenizer(folder)) == size == len(token_bytes(load_tokenizer(folder)))
    )
    run = SFTConfig(init_from=str(folder), chat=None)
    with setup.ranks():
        base_state = open_base(run, tmp_path / "cache")
    new = [base_state.chat.tokenizer.token_to_id(token) for token in CHAT_TOKENS]
    assert new == list(range(size, size + len(CHAT_TOKENS)))
    assert {token: base_state.chat.tokenizer.token_to_id(token) for token in ids} == ids
    assert base_state.files.new_tokens == range(size, new[-1] + 1)
    assert base_state.run.model.vocab_size == max(model.config.vocab_size, new[-1] + 1)
    token_texts = {
        token: base_state.chat.tokenizer.id_to_token(index) for token, index in ids.items()
    }
    assert token_texts == {token: token for token in ids}

    grown = NanoLlama(base_state.run.model)
    load_weights(grown, folder, base_state.files.new_tokens)
    reference = build_reference(folder, base_state.run.model, base_state.files.new_tokens)
    for weights in (grown, reference):
        for rows, before in (
            (weights.embed_tokens.weight, model.embed_tokens.weight),
            (weights.lm_head.weight, model.lm_head.weight),
        ):
            old_ids = [i for i in range(len(before)) if i not in new]
            assert torch.equal(rows[old_ids], before[old_ids])
            assert torch.allclose(rows[new], before[:size].mean(0).expand(len(new), -1), atol=1e-6)


def test_a_chat_tokenizer_with_holes_goes_on_to_gguf_transformers_and_a_second_stage(
    base, tmp_path
):
    from transformers import PreTrainedTokenizerFast

    folder, ids, _ = base
    chat = save_chat_tokenizer(tmp_path / "chat", folder)
    size, text = vocabulary_size(chat.tokenizer), "a zz <|one|> b"
    again = save_chat_tokenizer(tmp_path / "again", tmp_path / "chat")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (
        tmp_path / "chat/tokenizer.json"
    ).read_bytes()
    assert again.ids == chat.ids

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "chat/tokenizer.json"))
    plain = Tokenizer.from_file(str(tmp_path / "chat/tokenizer.json"))
    expected = plain.encode(text, add_special_tokens=False).ids
    assert theirs(text, add_special_tokens=False)["input_ids"] == expected
    assert {token: theirs.convert_tokens_to_ids(token) for token in chat.ids} == chat.ids

    vocabulary = read_vocabulary(tmp_path / "chat", size + 5)
    assert {vocabulary.tokens.index(token): token for token in ids} == {
        index: token for token, index in ids.items()
    }
    assert all(vocabulary.tokens[index] == token for token, index in chat.ids.items())
    known = set(plain.get_vocab().values())
    assert [i for i, kind in enumerate(vocabulary.types) if kind == UNUSED] == [
        i for i in range(size + 5) if i not in known
    ]
    assert NORMAL in vocabulary.types
    back = build_tokenizer(vocabulary.tokens, vocabulary.types, vocabulary.merges, vocabulary.pre)
    assert back.get_vocab() == plain.get_vocab()
    assert back.encode(text, add_special_tokens=False).ids == expected


def test_ids_that_contradict_each_other_are_refused(tmp_path):
    def same_id(content: dict) -> None:
        content["added_tokens"] += [added(300, "<|one|>"), added(300, "<|two|>")]

    def taken_id(content: dict) -> None:
        content["added_tokens"] += [added(100, "<|one|>")]

    for change in (same_id, taken_id):
        (tmp_path / "tokenizer.json").write_text(tokenizer_with(change), encoding="utf-8")
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged.* both have the id"):
            load_tokenizer(tmp_path)


def test_a_tokenizer_of_more_ids_than_the_model_has_rows_is_refused(tmp_path):
    from train_sft import SFTConfig

    config = ModelConfig(260, 32, 64, 1, 2, 2, max_position_embeddings=4096)
    save_hf(tmp_path, config, NanoLlama(config, seed=0).state_dict(), torch.float32)
    (tmp_path / "tokenizer.json").write_text(tokenizer_with(hole_in_added_tokens), encoding="utf-8")
    with (
        pytest.raises(ValueError, match="has id 270, but the embedding has 260 rows"),
        setup.ranks(),
    ):
        open_base(SFTConfig(init_from=str(tmp_path), chat=None), tmp_path / "cache")


def test_a_tokenizer_without_holes_stays_byte_for_byte(tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_with(lambda content: None), encoding="utf-8")
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).to_str() == plain.to_str()
    chat = save_chat_tokenizer(tmp_path / "chat", tmp_path)
    assert (
        isinstance(chat, Chat)
        and "<|im_end|>" not in json.loads(chat.tokenizer.to_str())["model"]["vocab"]
    )

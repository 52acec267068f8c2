"""Continued pretraining: Llama and Qwen3 folders with their own tokenizers, from text to export."""

import json
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, complaint_of, library, read_metrics, write_documents
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import train
from data import manifest
from data.pipeline.prepare import prepare, train_store_tokenizer
from data.pipeline.recipe import Recipe
from data.shards import TokenShards
from data.tokenizers.bpe import (
    config_ids,
    document_tokens,
    load_tokenizer,
    token_bytes,
    train_tokenizer,
)
from export.gguf_plan import read_config as exported_config
from inference.chat_formats import bos_and_stop_ids
from models.hf import check_model_folder, config_json, load_hf, read_hf_config
from scripts import preview
from training.checkpoint import full_state_dict
from training.config import RunConfig, load, to_dict
from training.settings import load_settings

SIZE = 320  # tokens, of which the last is an added one
ROWS = 384  # of the embedding: padded
SHAPE = {
    "vocab_size": ROWS,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TEXTS = [text for _, text in library(60)]
BEGIN, END, EXTRA = "<|begin_of_text|>", "<|end_of_text|>", "<|extra|>"
CONTINUE = ROOT / "configs" / "continue.yaml"


def write_tokenizer(folder: Path, config: dict, names: tuple[str, ...]) -> Tokenizer:
    """Write a tokenizer whose special tokens are `names`; it adds the first as Llama 3's does."""
    content = json.loads(train_tokenizer(TEXTS[:20], SIZE - len(names) + 2).to_str())
    content["added_tokens"] = []
    vocabulary = content["model"]["vocab"]
    for token in ("<|endoftext|>", "<|pad|>"):  # of our own tokenizers
        del vocabulary[token]
    for number, token in enumerate(vocabulary):
        vocabulary[token] = number
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    first = (names[0], tokenizer.token_to_id(names[0]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A", special_tokens=[first]
    )
    tokenizer.enable_truncation(16)  # as some folders have saved it
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def base(request, tmp_path_factory) -> Path:
    """A folder that transformers wrote: Llama 3's scaling and bos, or Qwen3 without bos."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    torch.manual_seed(0)
    if request.param == "llama":
        config = LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 500_000.0, **LLAMA3})
        LlamaForCausalLM(config).save_pretrained(folder)
        write_tokenizer(
            folder, {"bos_token": BEGIN, "eos_token": END, "pad_token": END}, (BEGIN, END, EXTRA)
        )
    else:
        shape = {**SHAPE, "tie_word_embeddings": False}
        config = Qwen3Config(**shape, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
        Qwen3ForCausalLM(config).save_pretrained(folder)
        names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        write_tokenizer(folder, {"bos_token": None, "eos_token": "<|im_end|>"}, names)
        (folder / "generation_config.json").write_text(
            json.dumps({"eos_token_id": load_tokenizer(folder).token_to_id("<|im_end|>")})
        )
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


@pytest.fixture(scope="module")
def store(base) -> Path:
    """Shards of the base model's own tokenizer, by the pipeline."""
    folder = base.parent / "store"
    write_documents(folder, "mine", [(f"d{i}", text) for i, text in enumerate(TEXTS)])
    overrides = [f"store={folder}", f"tokenizer.folder={base}", "dedup.kind=none"]
    overrides += ["val_fraction=0.2", "executor.workers=1"]
    recipe = load_settings(Recipe, ROOT / "configs" / "data" / "continue.yaml", overrides)
    assert prepare(recipe) == "done" and prepare(recipe) == "already there"
    return folder


def arguments(base: Path, store: Path, *more: str, steps: int = 4) -> list[str]:
    return [
        *("--config", str(CONTINUE), "--init_from", str(base), "--steps", str(steps)),
        *(f"data.store={store}", "data.sequence_length=64", "data.tokens_per_step=128"),
        *("optim.lr=2e-3", "parallel.dtype=float32", "checkpoint.every=2"),
        "data.micro_batch_size=1",
        *(f"output_dir={base.parent / 'out'}", f"log_dir={base.parent / 'logs'}", *more),
    ]


def continued(base: Path, store: Path, *more: str, steps: int = 4) -> None:
    _, _, _, _, _, count, *overrides = arguments(base, store, *more, steps=steps)
    run = load(CONTINUE, overrides, {"init_from": base, "steps": count})
    with train.setup.ranks() as device:
        assert train.pretrain(run, 0, 1, device, test=False) == 0


@pytest.fixture(scope="module")
def result(base, store) -> Path:
    continued(base, store)
    return base.parent / "out" / "step_4"


def test_shards_have_the_ids_of_the_folders_tokenizer(base, store):
    tokenizer = AutoTokenizer.from_pretrained(base)
    shards = TokenShards(store / "tokens" / "mine", "train")
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in (BEGIN, END))
    if "qwen3" in str(base):
        begin, end = tokenizer.convert_tokens_to_ids("<|endoftext|>"), None
    recorded = manifest.read(store / "tokens" / "mine")
    assert recorded["document_tokens"] == {"first": begin, "last": end}
    read, _ = shards.read(0, len(shards))
    starts = np.concatenate([s + b for s, b in zip(shards.starts, shards.bounds, strict=False)])
    documents = {tuple(part.tolist()) for part in np.split(read, starts[1:])}
    tokenizer.backend_tokenizer.no_truncation()
    options = {"add_special_tokens": False, "split_special_tokens": True}
    ids = [tokenizer(text, **options)["input_ids"] for text in TEXTS]
    tail = [] if end is None else [end]
    assert documents <= {(begin, *row, *tail) for row in ids} and len(documents) > 30
    sizes = token_bytes(load_tokenizer(base))
    for text, row in zip(TEXTS, ids, strict=True):
        assert sizes[row].sum() == len(text.encode())


def test_the_run_starts_from_the_models_function(base, store):
    """Step 0 has transformers' logits, though the config repeats no setting of the model."""
    run = load(CONTINUE, [f"data.store={store}"], {"init_from": base})
    tokens = torch.from_numpy(TokenShards(store / "tokens" / "mine", "val").read(0, 128)[0])[None]
    with train.setup.ranks() as device, torch.no_grad():
        run = load(CONTINUE, ["parallel.dtype=float32"], {"init_from": base})
        logits = train.setup.build(run, device).model.eval()(tokens)
        expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(tokens).logits
    assert expected.std() > 0.5 and (logits - expected).abs().max() <= 1e-5


def test_training_lowers_the_loss_and_exports_the_folders_tokenizer(base, store, result):
    log = (base.parent / "logs" / "events.jsonl").read_text()
    before = next(e for e in map(json.loads, log.splitlines()) if e["event"] == "measured")
    key = "val/mine/bits_per_byte"
    after = read_metrics(base.parent / "logs")[-1]
    assert 0 < after[key] < before[key]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).is_file():
            assert (result / name).read_bytes() == (base / name).read_bytes()
    known, config = read_hf_config(base), read_hf_config(result)
    assert known == config and (config.rope_scaling is None) == ("qwen3" in str(base))
    tokens = torch.randint(SIZE, (1, 64))
    model = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32)
    with torch.no_grad():
        assert (model(tokens).logits - load_hf(result)(tokens)).abs().max() <= 1e-5
    assert AutoTokenizer.from_pretrained(result)(TEXTS[0]) == AutoTokenizer.from_pretrained(base)(
        TEXTS[0]
    )
    if config.rope_scaling is not None:
        with pytest.raises(ValueError, match=r"has Llama 3's rope_scaling.*convert_hf_to_gguf\.py"):
            exported_config(result)
    separators = document_tokens(base, load_tokenizer(base))
    _, stops = bos_and_stop_ids(result)  # generation stops where documents end
    assert (separators.first if separators.last is None else separators.last) in stops


def test_a_resumed_run_is_exact(base, store, result, tmp_path):
    if "qwen3" in str(base):
        pytest.skip("one architecture is enough")
    place = (f"output_dir={tmp_path / 'out'}", f"log_dir={tmp_path / 'logs'}")
    continued(base, store, *place, "until=2")
    continued(base, store, *place)
    assert (tmp_path / "out" / "step_4" / "model.safetensors").read_bytes() == (
        result / "model.safetensors"
    ).read_bytes()


def test_the_schedule_follows_from_the_steps(base):
    run = load(CONTINUE, [], {"init_from": base, "steps": 300})
    schedule = run.schedule
    assert (schedule.warmup_steps, schedule.total_steps, schedule.decay_steps) == (3, 300, 297)
    run = load(CONTINUE, ["schedule.warmup_steps=20"], {"init_from": base, "steps": 300})
    assert (run.schedule.warmup_steps, run.schedule.decay_steps) == (20, 280)
    assert run.model == read_hf_config(base) and run.rope_theta == run.model.rope_theta


def test_a_logged_config_can_be_run_again(base, result, tmp_path):
    path = base.parent / "logs" / "continue.config.yaml"
    assert to_dict(load(path)) == to_dict(load_settings(RunConfig, path))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hidden_size=64", r"was trained with model\.hidden_size=48, but the config has 64"),
        ("model.rms_norm_eps=1e-3", r"model\.rms_norm_eps=1e-06, but the config has"),
        ("model.kind=moe", r"was trained with model\.kind=dense, but the config has moe"),
        ("data.sequence_length=1024", "exceeds the model's context"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(base, override, words):
    with pytest.raises(ValueError, match=words):
        load(CONTINUE, [override, "data.tokens_per_step=1024"], {"init_from": base})


@pytest.fixture
def other(base, tmp_path) -> Path:
    """The base model with another tokenizer of the same size."""
    folder = tmp_path / "other"
    shutil.copytree(base, folder)
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8").replace(EXTRA, "<|other|>")
    path.write_text(text.replace("<|im_start|>", "<|other|>"), encoding="utf-8")
    assert load_tokenizer(folder).get_vocab() != load_tokenizer(base).get_vocab()
    return folder


def test_another_tokenizer_is_refused(base, store, other, tmp_path, capsys, monkeypatch):
    place = (f"output_dir={tmp_path / 'out'}", f"log_dir={tmp_path / 'logs'}")
    words = complaint_of(train.main, arguments(other, store, *place), capsys, monkeypatch)
    assert "was trained with another tokenizer than" in words and "tokenizer.folder" in words
    lost = ["--config", str(CONTINUE), "--init_from", "nowhere", f"data.store={store}"]
    words = complaint_of(train.main, lost, capsys, monkeypatch)
    assert "checkpoint nowhere does not exist; check the path" in words


def test_a_model_of_the_hub_gets_the_command_that_downloads_it(tmp_path, capsys, monkeypatch):
    names = {point.name for point in metadata.distribution("huggingface_hub").entry_points}
    assert "hf" in names
    monkeypatch.chdir(tmp_path)
    command = "hf download owner/model-1.5B --local-dir model-1.5B and give model-1.5B"
    given = ["--config", str(CONTINUE), "--init_from"]
    assert command in complaint_of(train.main, [*given, "owner/model-1.5B"], capsys, monkeypatch)
    with pytest.raises(ValueError, match=command):
        check_model_folder(Path("owner/model-1.5B"))
    (tmp_path / "checkpoints").mkdir()
    for path in ("checkpoints/typo", "/owner/model", "a/b/c", "model"):
        assert "hf download" not in complaint_of(train.main, [*given, path], capsys, monkeypatch)


def test_a_phase_folder_stands_for_its_newest_step(base, store, tmp_path):
    phase = tmp_path / "phase"
    for number in (3, 20):
        shutil.copytree(base, phase / f"step_{number}")
    run = load(CONTINUE, [], {"init_from": phase})
    assert run.init_from == str(phase / "step_20") and run.model == read_hf_config(base)
    overrides = [f"store={tmp_path / 'store'}", f"tokenizer.folder={phase}"]
    recipe = load_settings(Recipe, ROOT / "configs" / "data" / "continue.yaml", overrides)
    assert train_store_tokenizer(recipe)
    copied = tmp_path / "store" / "tokenizer" / "tokenizer.json"
    assert copied.read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("spelling", ["--init_from", "--base_model", "init_from="])
def test_the_preview_shows_the_rows_of_a_padded_model(
    spelling, base, store, capsys, monkeypatch, tmp_path
):
    given = [f"init_from={base}"] if spelling.endswith("=") else [spelling, str(base)]
    shape = ["data.sequence_length=64", "data.tokens_per_step=128", "data.micro_batch_size=1"]
    words = ["--config", str(CONTINUE), f"data.store={store}", *given, *shape]
    monkeypatch.setattr("sys.argv", ["x", *words])
    preview.main()
    assert "step 0: 2 rows of 64 tokens" in capsys.readouterr().out


def test_a_recipe_without_tokenizer_names_both_ways(tmp_path):
    overrides = [f"store={tmp_path}"]
    recipe = load_settings(Recipe, ROOT / "configs" / "data" / "continue.yaml", overrides)
    words = r"has no tokenizer.json; .*tokenizer\.folder=FOLDER .*--train_tokenizer$"
    with pytest.raises(ValueError, match=words):
        prepare(recipe)


def test_without_init_from_the_error_names_it(base, store, capsys, monkeypatch):
    given = ["--config", str(CONTINUE), f"data.store={store}", "model.num_hidden_layers=1"]
    words = "make them equal, or continue the model of that tokenizer with --init_from FOLDER"
    assert words in complaint_of(train.main, given, capsys, monkeypatch)


def test_longer_rows_need_a_scaling(base):
    if read_hf_config(base).rope_scaling is None:
        with pytest.raises(ValueError, match=r"=1024 exceeds the 512 positions of .*; lower it"):
            load(CONTINUE, ["model.max_position_embeddings=1024"], {"init_from": base})
    else:
        assert load(CONTINUE, ["model.max_position_embeddings=1024"], {"init_from": base})


def test_equal_settings_may_be_repeated(base):
    more = ["model.hidden_size=48", "model.rms_norm_eps=1.0e-6", "model.initializer_range=0.02"]
    run = load(CONTINUE, more, {"init_from": base})
    assert run.model.hidden_size == 48 and run.model.initializer_range == 0.02


def test_tokens_beyond_the_embedding_get_rows(base, store, tmp_path):
    """A folder whose user added tokens without resizing the model."""
    grown = tmp_path / "grown"
    shutil.copytree(base, grown)
    tokenizer = load_tokenizer(grown)
    tokenizer.add_tokens([f"<new_{number}>" for number in range(ROWS - SIZE + 3)])
    tokenizer.save(str(grown / "tokenizer.json"))
    run = load(CONTINUE, ["parallel.dtype=float32"], {"init_from": grown})
    assert run.model.vocab_size == ROWS + 3
    with train.setup.ranks() as device:
        weight = full_state_dict(train.setup.build(run, device).model)["embed_tokens.weight"]
    known = load_hf(base).embed_tokens.weight
    assert torch.equal(weight[:ROWS], known)
    assert torch.allclose(weight[ROWS:], known.mean(0).expand(3, -1), atol=1e-6)


def test_a_store_keeps_its_tokenizer(store, other):
    kept = (store / "tokenizer" / "tokenizer.json").read_bytes()
    config = ROOT / "configs" / "data" / "continue.yaml"
    overrides = [f"store={store}", f"tokenizer.folder={other}"]
    with pytest.raises(ValueError, match="is another tokenizer than that of"):
        prepare(load_settings(Recipe, config, overrides))
    assert (store / "tokenizer" / "tokenizer.json").read_bytes() == kept
    lost = load_settings(Recipe, ROOT / "configs/data/continue.yaml", ["tokenizer.folder=nowhere"])
    with pytest.raises(ValueError, match=r"nowhere has no tokenizer\.json; give a model folder"):
        prepare(lost)


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
        # Llama 3; its chat model; SmolLM2's chat model; Qwen3; a model with one separator
        ({"bos_token": BEGIN, "eos_token": END}, (BEGIN, END), (BEGIN, END)),
        ({"bos_token": BEGIN, "eos_token": "<|eot_id|>"}, (BEGIN, END, "<|eot_id|>"), (BEGIN, END)),
        (
            {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            ("<|endoftext|>", None),
        ),
        ({"eos_token": "<|endoftext|>"}, ("<|endoftext|>",), ("<|endoftext|>", None)),
        ({"bos_token": "<s>", "eos_token": "</s>"}, ("<s>", "</s>"), ("<s>", "</s>")),
        ({"eos_token": {"content": "<end>"}}, ("<end>",), ("<end>", None)),
    ],
)
def test_separators_of_documents(config, names, expected, tmp_path):
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    first, last = document_tokens(tmp_path, tokenizer)
    assert (names[first], None if last is None else names[last]) == expected
    ids = config_ids(tmp_path, tokenizer)
    eos = ids["eos"] if isinstance(ids["eos"], list) else [ids["eos"]]
    assert (first if last is None else last) in eos


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "has no bos or eos token to separate documents; name one in"),
        ({"bos_token": "<s>"}, "bos_token is '<s>', which tokenizer.json lacks"),
    ],
)
def test_no_separator_is_refused(config, words, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        document_tokens(tmp_path, Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))


def test_bytes_of_a_sentencepiece_vocabulary():
    """Text bytes are exact with byte fallback and with added tokens that are text."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "é", "▁a"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["~~~~"])
    text = "a é a\n漢~~~~ a"
    ids = tokenizer.encode(text).ids
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert token_bytes(tokenizer)[1] == 0


def test_unsupported_models_are_named(base, tmp_path):
    for key, value in (("attention_bias", True), ("mlp_bias", True), ("model_type", "qwen2")):
        folder = tmp_path / key
        folder.mkdir()
        content = {**config_json(base), key: value}
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=str(value) if key == "model_type" else key):
            load(CONTINUE, [], {"init_from": folder})
    shutil.copyfile(base / "tokenizer.json", folder / "tokenizer.json")
    content = {**config_json(base), "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"has the id \d+, but the embedding has 100 rows; use the"
    ):
        load(CONTINUE, [], {"init_from": folder})

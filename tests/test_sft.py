"""SFT: loss equals transformers and TRL; packing, mixture, truncation, bad rows, restarts."""

import dataclasses
import json
import sys
from itertools import pairwise
from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT, one_thread, read_metrics

import train_sft
from benchmarks import parity_sft
from data.chat.rendering import Chat
from data.chat.sft import ChatConfig, ChatSource, Conversations, prepare
from data.chat.tokenizer import save_chat_tokenizer
from data.dataloader import PackedDataLoader
from data.packing import IGNORE
from models.hf import load_hf, read_hf_config
from training import setup
from training.fine_tuning import TuningRun
from training.objectives import neftune_noise, next_token, with_neftune
from training.schedulers import ScheduleConfig, WSDScheduler
from training.settings import load_settings


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("case")
    parity_sft.write_case(folder)
    save_chat_tokenizer(folder / "tokenizer", folder / "base")
    return folder


def conversation(question: str, *answers: str) -> dict:
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for answer in answers
    ]
    return {"messages": [message for turn in turns for message in turn]}


def write(path: Path, rows: list[dict]) -> ChatSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ChatSource(str(path))


def rows_of(
    case: Path, tmp_path: Path, sources: dict[str, ChatSource], length: int = 128, **options
) -> dict[str, Conversations]:
    config = ChatConfig(sources, cache=str(tmp_path / "cache"), **{"val_fraction": 0.0, **options})
    folders = prepare(config, sources, case / "tokenizer", length)
    return {name: Conversations(folder, "train") for name, folder in folders.items()}


def test_packed_loss_equals_transformers_one_by_one(case, tmp_path):
    """Compare token by token; one conversation does not influence another in its row."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    sources = rows_of(case, tmp_path, {"rows": ChatSource(str(case / "rows.jsonl"))}, 600)
    loader = PackedDataLoader(sources, {"rows": 1.0}, 600, 1, 1, seed=0)
    [batch] = loader.at(0).batches
    model = load_hf(case / "base")
    # Chat tokens are single tokens.
    batch = batch._replace(tokens=batch.tokens.clamp_max(257), targets=batch.targets.clamp_max(257))
    ours = model(batch.tokens, batch.targets, batch.doc_ids).nll
    theirs = LlamaForCausalLM.from_pretrained(case / "base", dtype=torch.float32)
    tokenizer, training = (
        AutoTokenizer.from_pretrained(case / "tokenizer"),
        case / "tokenizer" / "chat_template_training.jinja",
    )
    total = torch.zeros(())
    for row in parity_sft.CONVERSATIONS:
        rendered = tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            chat_template=training.read_text(),
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
        )
        ids = rendered["input_ids"].clamp_max(257)
        labels = ids.masked_fill(
            torch.as_tensor(rendered["assistant_masks"]).view_as(ids) == 0, IGNORE
        )
        count = (labels[:, 1:] != IGNORE).sum()
        total += theirs(ids, labels=labels).loss * count
    assert ours.sum().item() == pytest.approx(total.item(), rel=1e-6)
    assert (
        loader.at(0).loss_denominator
        == int((batch.targets != IGNORE).sum())
        == int((ours != 0).sum())
    )
    first = batch.doc_ids[0] == 0
    changed = model(batch.tokens.where(~first, 5), batch.targets, batch.doc_ids).nll
    assert torch.equal(changed[0][~first], ours[0][~first]) and not torch.equal(
        changed[0][first], ours[0][first]
    )


def test_loss_and_gradient_equal_trl(case):
    pytest.importorskip("trl", reason="needs requirements-parity.txt")
    # Together, one by one, and in one row.
    shapes = [
        (parity_sft.ROW, 2, 2),
        (parity_sft.ROW, 2, 1),
        (2 * parity_sft.ROW, 1, 1),
    ]
    ours = [parity_sft.ours(case, *shape) for shape in shapes]
    theirs = [
        parity_sft.trl(case, 3, 1, False),
        parity_sft.trl(case, 1, 3, False),
        parity_sft.trl(case, 1, 1, True),
    ]
    for figures in [*ours, *theirs]:
        assert figures["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-5)
        assert figures["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=1e-5)


def test_the_mixture_is_by_trained_tokens_and_each_row_is_whole(case, tmp_path):
    short = write(
        tmp_path / "short.jsonl",
        [conversation("a long question " * 5 + str(i), "yes") for i in range(300)],
    )
    long = write(
        tmp_path / "long.jsonl",
        [conversation(str(i), f"{i} is an answer. " * (1 + i % 4)) for i in range(300)],
    )
    sources = rows_of(case, tmp_path, {"short": short, "long": long}, 256)
    mix = {"short": 0.25, "long": 0.75}
    loaders = [PackedDataLoader(sources, mix, 256, 8, 2, 3, rank, 2) for rank in (0, 1)]
    shares = loaders[0].shares(0, 250)
    assert shares == pytest.approx(mix, abs=0.01)
    steps = [loader.at(5) for loader in loaders]
    counted = sum(int((batch.targets != IGNORE).sum()) for step in steps for batch in step.batches)
    assert (
        counted == steps[0].loss_denominator == steps[1].loss_denominator
        and steps[0].tokens > steps[0].loss_denominator
    )
    assert torch.cat([batch.rows for step in steps for batch in step.batches]).tolist() == list(
        range(40, 48)
    )
    chat = Chat.from_folder(case / "tokenizer")
    for batch in steps[0].batches:
        for tokens, doc_ids in zip(batch.tokens, batch.doc_ids, strict=True):
            for doc in doc_ids.unique()[:-1]:
                piece = chat.tokenizer.decode(
                    tokens[doc_ids == doc].tolist(), skip_special_tokens=False
                )
                assert piece.startswith("<|endoftext|><|im_start|>user\n")


def test_long_conversations_are_cut_between_turns(case, tmp_path):
    fits, cut = conversation("q", "short"), conversation("q", "one", "two " * 10, "three " * 40)
    path = write(tmp_path / "rows.jsonl", [fits, cut])
    [source] = rows_of(case, tmp_path, {"rows": path}).values()
    chat = Chat.from_folder(case / "tokenizer")
    texts = [
        chat.tokenizer.decode(source.ids[a:b].tolist(), skip_special_tokens=False)
        for a, b in pairwise(source.starts)
    ]
    kept = chat.clean(conversation("q", "one", "two " * 10))
    assert texts == [chat.render(chat.clean(fits)).rstrip("\n"), chat.render(kept).rstrip("\n")]
    full_ids = chat.encode([chat.clean(cut)])[0]
    assert source.report["counts"]["cut"] == 1
    assert source.report["counts"]["tokens cut off"] == full_ids.ends[-1] - full_ids.ends[1]


def test_faulty_rows_are_counted_named_and_refused_above_the_limit(case, tmp_path):
    good = [conversation(f"q{i}", "a") for i in range(6)]
    bad = [
        {"messages": []},
        {"messages": [{"role": "user", "content": "alone"}]},
        conversation("q", "never fits " * 40),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join([*map(json.dumps, [*good, *bad]), "{broken"]))
    source = {"rows": ChatSource(str(tmp_path / "rows.jsonl"))}
    with pytest.raises(
        ValueError,
        match=r"rows: 40.0% of 10 conversations are malformed .*rows.jsonl:7.*or raise "
        r"chat.max_bad",
    ):
        rows_of(case, tmp_path, source)
    [prepared] = rows_of(case, tmp_path, source, max_bad=0.5).values()
    assert prepared.documents == 6 and sum(prepared.report["bad"].values()) == 4
    assert {line.split(": ")[0] for line in prepared.report["named"]} == {
        f"rows.jsonl:{line}" for line in (7, 8, 9, 10)
    }
    with pytest.raises(ValueError, match="are malformed"):
        rows_of(case, tmp_path, source, max_bad=0.39)  # also with a prepared cache
    odd = [{"messages": [{"role": f"role {i}", "content": "x"}]} for i in range(9)]
    with pytest.raises(
        ValueError, match=r"100.0% of 9 .*'role 4', 4 other faults; the first is odd.jsonl:1"
    ):
        rows_of(case, tmp_path, {"odd": write(tmp_path / "odd.jsonl", odd)})
    with pytest.raises(ValueError, match=r"has no usable conversation"):
        rows_of(case, tmp_path, {"none": write(tmp_path / "none.jsonl", [])})
    with pytest.raises(ValueError, match="unknown conversation format"):
        rows_of(case, tmp_path, {"rows": ChatSource(str(tmp_path / "rows.jsonl"), "chatml")})
    excluded = {
        path.name for path in (tmp_path / "cache").glob(".*") if not path.match("*.verified.json")
    }
    assert not excluded  # a failed preparation leaves no files


def test_prepared_conversations_are_kept_until_something_changes(case, tmp_path):
    source = {
        "rows": write(tmp_path / "rows.jsonl", [conversation(f"q{i}", "a") for i in range(200)])
    }
    [first] = rows_of(case, tmp_path, source, val_fraction=0.2).values()
    written = (first.folder / "train.ids.npy").stat().st_mtime_ns
    [again] = rows_of(case, tmp_path, source, val_fraction=0.2).values()
    assert (
        again.folder / "train.ids.npy"
    ).stat().st_mtime_ns == written and again.fingerprint == first.fingerprint
    validation = Conversations(first.folder, "val")
    assert 20 <= validation.documents <= 60 and validation.documents + first.documents == 200
    for changes in ({"length": 64}, {"system": "Be kind."}, {"val_fraction": 0.1}):
        [second] = rows_of(case, tmp_path, source, **{"val_fraction": 0.2, **changes}).values()
        assert second.folder != first.folder
    write(tmp_path / "rows.jsonl", [conversation("other", "a")] * 30)
    [second] = rows_of(case, tmp_path, source, val_fraction=0.2).values()
    assert second.fingerprint != first.fingerprint


def test_test_items_are_taken_out(case, tmp_path):
    item = (
        "A farmer sold forty nine crates of apples on Monday and half as many on Tuesday; how "
        "many crates were sold in all?"
    )
    (tmp_path / "items.jsonl").write_text(json.dumps({"id": "1", "text": item}) + "\n")
    rows = [
        conversation(f"Question {i}: what is the capital of country number {i}?", "I do not know.")
        for i in range(20)
    ]
    rows += [conversation(item, "73"), conversation("Please solve: " + item, "It is 73.")]
    source = {"rows": write(tmp_path / "rows.jsonl", rows)}
    [prepared] = rows_of(
        case, tmp_path, source, decontaminate=(str(tmp_path / "items.jsonl"),)
    ).values()
    assert prepared.documents == 20 and prepared.report["counts"]["contaminated"] == 2


def test_noise_is_bounded_by_row_and_only_in_training(case):
    doc_ids = torch.tensor([[0] * 8 + [1] * 24, [0] * 32], dtype=torch.int32)
    noise = neftune_noise(doc_ids, torch.tensor([5, 6]), 64, alpha=5.0, seed=1)
    for part, length in ((noise[0, :8], 8), (noise[0, 8:], 24), (noise[1], 32)):
        assert 0.9 < part.abs().max().item() / (5 / (length * 64) ** 0.5) <= 1
    # For any micro-batch size.
    assert torch.equal(neftune_noise(doc_ids[1:], torch.tensor([6]), 64, 5.0, 1), noise[1:])
    assert not torch.equal(neftune_noise(doc_ids[1:], torch.tensor([7]), 64, 5.0, 1), noise[1:])
    sources = rows_of(case, case, {"rows": ChatSource(str(case / "rows.jsonl"))}, 600)
    [batch] = PackedDataLoader(sources, {"rows": 1.0}, 600, 1, 1, seed=0).at(0).batches
    batch = batch._replace(tokens=batch.tokens.clamp_max(257), targets=batch.targets.clamp_max(257))
    model, plain = load_hf(case / "base"), next_token(0.0)
    before = plain(model, batch)[0].item()
    assert with_neftune(plain, 5.0, 0)(model, batch)[0].item() != before
    assert plain(model, batch)[0].item() == before


def sft_here(*overrides: str) -> bool:
    from train_sft import SFTConfig, finetune

    run = load_settings(SFTConfig, ROOT / "configs" / "sft.yaml", list(overrides))
    with setup.ranks() as device:
        return finetune(run, 0, 1, device) == 0


@pytest.fixture(scope="module")
def settings(case):
    """settings(where, ...): overrides for six steps on two sources with NEFTune noise."""
    answers = [conversation(f"Say {i}.", f"It is {i}. " * (1 + i % 9)) for i in range(60)]
    write(case / "more.jsonl", answers)

    def make(where: Path, *more: str) -> list[str]:
        sources = (
            f"{{rows: {{path: {case / 'rows.jsonl'}}}, more: {{path: {case / 'more.jsonl'}}}}}"
        )
        chat = (
            f"chat={{sources: {sources}, cache: {case / 'cache'}, val_fraction: 0.1, "
            f"neftune_alpha: 5}}"
        )
        base = parity_sft.overrides(
            case, 384, 4, 2, chat, "data.mix={rows: 0.3, more: 0.7}", "steps=6", "optim.lr=1e-3"
        )
        return [
            *base,
            "checkpoint.every=3",
            "validation.every=3",
            f"log_dir={where / 'logs'}",
            f"output_dir={where / 'out'}",
            *more,
        ]

    return make


def test_ranks_micro_batches_and_restarts_change_nothing(settings, case, tmp_path):
    """NEFTune noise is on; rows have very different numbers of trained tokens."""
    uninterrupted, split, paused = tmp_path / "whole", tmp_path / "split", tmp_path / "paused"
    assert sft_here(*settings(uninterrupted))
    launch = [
        sys.executable,
        "-m",
        "scripts.launch",
        "--nproc_per_node=2",
        str(ROOT / "train_sft.py"),
    ]
    command = [
        *launch,
        "--config",
        str(ROOT / "configs" / "sft.yaml"),
        "--batch_size",
        "1",
        *settings(split),
    ]
    done = forked.run(command, env=one_thread())
    assert done.returncode == 0, done.stderr
    sft_here(*settings(paused, "until=3"))
    sft_here(*settings(paused))
    one, two, again = (read_metrics(folder / "logs") for folder in (uninterrupted, split, paused))
    for key in ("loss", "grad_norm", "val/loss"):
        expected = [row[key] for row in one if key in row]
        assert [row[key] for row in two if key in row] == pytest.approx(
            expected, abs=1e-5, rel=1e-5
        ), key
        assert [row[key] for row in again if key in row] == expected, key  # bit for bit
    assert 0 < one[-1]["val/rows/trained_share"] < 1
    assert (split / "logs" / "samples.md").read_text().count(
        "> What is 12 + 7?"
    ) == 3  # before the first step, too
    weights = [
        (folder / "out" / "step_6" / "model.safetensors").read_bytes()
        for folder in (uninterrupted, paused)
    ]
    assert weights[0] == weights[1]


def test_what_sft_leaves_loads_in_transformers_and_goes_on(settings, tmp_path, case):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from models.hf import grow_vocabulary

    sft_here(*settings(tmp_path / "one", "steps=1", "optim.lr=1e-30"))
    folder = tmp_path / "one" / "out" / "step_1"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    assert len(tokenizer) == model.config.vocab_size == 258 + 8
    assert (
        tokenizer.convert_tokens_to_ids("<|im_end|>")
        == model.config.eos_token_id
        == tokenizer.eos_token_id
    )
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [tokenizer.eos_token_id, 0]
    before = load_hf(case / "base")
    for new, old in (
        (model.get_input_embeddings().weight, before.embed_tokens.weight),
        (model.lm_head.weight, before.lm_head.weight),
    ):
        assert torch.equal(new[:258], old) and torch.allclose(
            new[258:], old.mean(0).expand(8, -1), atol=1e-6
        )
    assert torch.equal(grow_vocabulary(old, range(258, 258), 258), old)
    # A folder of steps means its newest, whose tokenizer has the chat tokens.
    base = f"init_from={tmp_path / 'one' / 'out'}"
    assert sft_here(*settings(tmp_path / "two", base, "steps=1", "phase=again"))
    second = tmp_path / "two" / "out" / "step_1"
    assert (second / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert read_hf_config(second) == read_hf_config(folder)


def test_a_hugging_face_folder_is_a_base(settings, tmp_path, case, monkeypatch):
    """The base has tied embeddings, spare embedding rows, and <|im_start|> in its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(case / "base" / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "hf")
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        vocab_size=272, tie_word_embeddings=True, max_position_embeddings=512, **shape
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    overrides = [f"init_from={tmp_path / 'hf'}", "chat.val_fraction=0"]
    assert sft_here(*settings(tmp_path, *overrides, "chat.epochs=0.5"))
    [row, *_] = read_metrics(tmp_path / "logs")
    assert (tmp_path / "logs" / "samples.md").read_text().count(
        "> What is 12 + 7?"
    ) >= 2  # before and after
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train_sft.py",
            "--num_steps",
            "1",
            *settings(tmp_path / "b", *overrides, "chat.epochs=0.5"),
        ],
    )
    with pytest.raises(SystemExit):
        train_sft.main()
    # The flag goes before the config.
    assert [row["end"] for row in read_metrics(tmp_path / "b" / "logs")] == [1]
    [step_folder] = [
        folder for folder in (tmp_path / "out").iterdir() if folder.name == f"step_{row['end']}"
    ]
    assert read_hf_config(step_folder) == dataclasses.replace(
        read_hf_config(tmp_path / "hf"), vocab_size=272
    )
    ids = Chat.from_folder(step_folder).ids
    assert (ids["<|im_start|>"], ids["<|im_end|>"], ids["<|start_thought|>"]) == (258, 259, 260)


@pytest.mark.parametrize(
    ("kind", "steps", "warmup"), [("linear", 1, 0), ("linear", 50, 5), ("cosine", 7, 0)]
)
def test_rates_after_warm_up_equal_transformers(kind, steps, warmup):
    """No update has a learning rate of 0."""
    from transformers import get_scheduler

    run = TuningRun(steps=steps, schedule=ScheduleConfig(warmup, decay=kind)).with_schedule()
    ours = WSDScheduler(run.schedule, 1e-3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = get_scheduler(kind, optimizer, warmup, steps)
    for step in range(steps):
        if step >= warmup:
            assert 0 < ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["init_from=nowhere"], "nowhere has no complete checkpoint"),
        (["init_from=owner/model"], "hf download owner/model --local-dir model and give model"),
        (["data.mix={}"], "data.mix is empty; list at least one of chat.sources: rows, more"),
        (
            ["chat.sources.rows.limit=-1"],
            "chat.sources.rows.limit=-1 must be at least 1; leave it out to take all",
        ),
        (["chat.epochs=inf"], "chat.epochs='inf' must be a finite number"),
        (["chat.samples=['']"], "chat.samples: invalid prompt '' .a user message is empty"),
        (
            [f"chat.samples=['{'word ' * 400}']"],
            "chat.samples: 'word word .* leaves no room for a reply",
        ),
        (
            ["data.mix={others: 1}"],
            "data.mix.others: chat.sources has no such source; available: rows, more",
        ),
        (["data.sequence_length=2048", "data.tokens_per_step=4096"], "exceeds the model's context"),
        (["chat.sources.rows.format=chatml"], "unknown conversation format 'chatml'"),
        (
            ["chat.sources.rows.path=nowhere.jsonl"],
            "no file of type .jsonl, .*found at nowhere.jsonl; check the path",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(settings, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        sft_here(*settings(tmp_path, *more))

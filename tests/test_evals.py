"""Scores equal lm-evaluation-harness'; the harness resumes and splits over ranks."""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT, VOCAB, one_thread, tiny_config

from data.tokenizers.bpe import load_tokenizer, save_tokenizer
from evals import eval_arc, eval_hellaswag, eval_mmlu, eval_perplexity, eval_truthfulqa
from evals.engines import group_by_prefix, load_model
from evals.harness import Cache, Choose, Eval, Item, Read, TooLong, Write, means, results, run_items
from evals.language_model import ScoreRequest, rolling_windows
from evals.local_rows import write_mmlu_tasks, write_rows
from evals.run import evaluate
from models.hf import save_hf
from models.nanollama import NanoLlama

CONFIG = tiny_config(intermediate_size=128, max_position_embeddings=1024)
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "rain",
    "fell",
    "over",
    "hills",
    "and",
    "nobody",
    "knew",
    "why",
    "it",
    "had",
    "begun",
    "so",
    "early",
]


def text(i: int, count: int = 6) -> str:
    return " ".join(WORDS[(i * 7 + k * (1 + i % 3)) % len(WORDS)] for k in range(count))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A root folder whose small data/store/evals has the edge cases of the real data sets."""
    root = tmp_path_factory.mktemp("rows")
    folder = root / "data" / "store" / "evals"
    hellaswag = [
        {
            "activity_label": f"Topic {i}",
            "ctx_a": text(i, 9) + (" [header] How to [title]" if i % 4 == 0 else "."),
            "ctx_b": "" if i % 4 == 0 else "he",  # the context then ends in a space
            "endings": [
                text(i + k, 3 + k) + (" [substeps] then." if k == 2 else "") for k in range(4)
            ],
            "label": str(i % 4),
        }
        for i in range(12)
    ]
    write_rows(folder / "hellaswag" / "validation.jsonl", hellaswag)
    labels = (
        ["A", "B", "C", "D"],
        ["1", "2", "3", "4"],
        ["A", "B", "C"],
        ["A", "B", "C", "D", "E"],
    )
    for part in ("arc_challenge", "arc_easy"):
        for split, first, count in (("validation", 50, 8), ("test", 0, 8)):
            content = [
                {
                    "id": f"{part}_{i}",
                    "question": text(i, 8) + "?",
                    "choices": {
                        "text": [text(i + k, 1 + k) for k in range(len(labels[i % 4]))],
                        "label": labels[i % 4],
                    },
                    "answerKey": labels[i % 4][i % 3],
                }
                for i in range(first, first + count)
            ]
            write_rows(folder / part / f"{split}.jsonl", content)
    splits = {
        split: [
            {
                "question": f" {text(i, 10)}? ",
                "choices": [text(i + k, 2 + k) for k in range(4)],
                "answer": i % 4,
                "subject": subject,
            }
            for subject in ("high_school_cats", "rain")
            for i in range(first, first + count)
        ]
        for split, first, count in (("dev", 70, 5), ("test", 0, 7))
    }
    for split, content in splits.items():
        write_rows(folder / "mmlu" / f"{split}.jsonl", content)
    write_mmlu_tasks(folder, splits)
    truth = [
        {
            "question": text(i, 7) + "?",
            "mc1_targets": {"choices": [text(i + k, 4) for k in range(3)], "labels": [1, 0, 0]},
            "mc2_targets": {
                "choices": [text(i + k, 1 + k) for k in range(5)],
                "labels": [1, 1, 0, 0, 0],
            },
        }
        for i in range(8)
    ]
    write_rows(folder / "truthfulqa" / "validation.jsonl", truth)
    return root


def options(rows: Path, **more) -> argparse.Namespace:
    defaults = {
        "data": str(rows / "data" / "store" / "evals"),
        "cache": Path("nowhere"),
        "limit": None,
        "seed": 1234,
    }
    return argparse.Namespace(**{**defaults, **more})


def logprobs(sample, which: int = 0) -> list[float]:
    return [scored.logprob for scored in sample.exchange[which][1]]


def test_scores_equal_lm_eval_on_the_same_rows(checkpoint, model, rows, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(rows)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    folders = [str(ROOT / "evals" / "lm_eval_tasks"), str(rows / "data/store/evals/lm_eval_tasks")]
    manager = TaskManager(include_path=folders, include_defaults=False)
    theirs = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4)
    subjects = ("high_school_cats", "rain")
    cases = [  # evaluation, shots, its tasks, and which request of an item is theirs
        (eval_hellaswag.build(options(rows, shots=0)), 0, {"local_hellaswag": 0}),
        (
            eval_arc.build(options(rows, shots=3, part="both")),
            3,
            {"local_arc_challenge": 0, "local_arc_easy": 0},
        ),
        (
            eval_mmlu.build(options(rows, shots=5, format="letter")),
            5,
            {f"local_mmlu_{s}": 0 for s in subjects},
        ),
        (
            eval_mmlu.build(options(rows, shots=2, format="both")),
            2,
            {f"local_mmlu_cloze_{s}": 1 for s in subjects},
        ),
        (
            eval_truthfulqa.build(options(rows)),
            0,
            {"local_truthfulqa_mc1": 0, "local_truthfulqa_mc2": 1},
        ),
    ]
    for evaluation, shots, tasks in cases:
        responses = run_items(evaluation.items, evaluation.score, model, Cache())
        scores = results(evaluation, responses, model)
        reference = simple_evaluate(
            model=theirs,
            tasks=list(tasks),
            num_fewshot=shots,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )
        for task, which in tasks.items():
            matching = [s for s in responses if s.subject and task.endswith(s.subject)] or responses
            samples = sorted(reference["samples"][task], key=lambda sample: sample["doc_id"])
            assert len(samples) == len(matching)
            for sample, our_response in zip(samples, matching, strict=True):
                expected = [float(response[0][0]) for response in sample["resps"]]
                assert logprobs(our_response, which) == pytest.approx(expected, abs=1e-3), (
                    task,
                    our_response.id,
                )
                assert expected.index(max(expected)) == logprobs(our_response, which).index(
                    max(logprobs(our_response, which))
                )
        figures, metrics = (
            reference["results"],
            {name: estimate["value"] for name, estimate in scores["metrics"].items()},
        )
        if "local_arc_easy" in tasks:
            for name in ("acc", "acc_norm"):
                assert metrics[f"challenge_{name}"] == pytest.approx(
                    figures["local_arc_challenge"][f"{name},none"], abs=1e-9
                )
                assert metrics[f"easy_{name}"] == pytest.approx(
                    figures["local_arc_easy"][f"{name},none"], abs=1e-9
                )
        elif "local_truthfulqa_mc1" in tasks:
            assert metrics["mc1"] == pytest.approx(
                figures["local_truthfulqa_mc1"]["acc,none"], abs=1e-9
            )
            assert metrics["mc2"] == pytest.approx(
                figures["local_truthfulqa_mc2"]["acc,none"], abs=1e-4
            )
        elif "local_hellaswag" in tasks:
            for name in ("acc", "acc_norm"):
                assert metrics[name] == pytest.approx(
                    figures["local_hellaswag"][f"{name},none"], abs=1e-9
                )
        else:
            for subject, task in zip(subjects, tasks, strict=True):
                for name in ("cloze_acc", "cloze_acc_norm") if "cloze" in task else ("acc",):
                    our_response = scores["subjects"][subject]["metrics"][name]["value"]
                    assert our_response == pytest.approx(
                        figures[task][f"{name.removeprefix('cloze_')},none"], abs=1e-9
                    )
    words = [text(i, 400) for i in range(2)]  # longer than the context
    expected_scores = run_items([Item(w, {}) for w in words], reader(None), model, Cache())
    rolled = theirs.loglikelihood_rolling(
        [argparse.Namespace(args=(w,)) for w in words], disable_tqdm=True
    )
    assert [sample.scores["logprob"] for sample in expected_scores] == pytest.approx(
        rolled, rel=1e-5
    )


def reader(stride):
    def score(item):
        reading = yield Read(item.id, stride)
        return {"logprob": reading.logprob, "tokens": reading.tokens, "bytes": reading.bytes}

    return score


def test_logprobs_equal_transformers_with_and_without_a_shared_prefix(checkpoint, model):
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, VOCAB, (count,), generator=generator).tolist())

    common = draw(120)
    units = [ScoreRequest(common + draw(3 + i), (draw(1), draw(4), draw(2 + i))) for i in range(12)]
    units += [ScoreRequest(draw(40 + 9 * i), (draw(6),)) for i in range(5)] + [
        ScoreRequest(draw(900), (draw(2), draw(120)))
    ]
    groups = group_by_prefix(units)
    assert groups[0][0] == 120 and len(groups[0][1]) == 12 and groups[1][0] == 0
    [(shared, together)] = group_by_prefix(units, min_saved=120 * 11 + 1)
    assert shared == 0 and sorted(together) == list(range(len(units)))
    scored = {i: answer for batch in model.engine.score(units) for i, answer in batch}
    assert sorted(scored) == list(range(len(units)))
    for i, unit in enumerate(units):
        for option, answer in zip(unit.continuations, scored[i], strict=True):
            with torch.no_grad():
                logits = net(torch.tensor([unit.context + option])).logits[0].log_softmax(-1)
            places = range(len(unit.context) - 1, len(unit.context) + len(option) - 1)
            expected = sum(
                logits[place, token].item() for place, token in zip(places, option, strict=True)
            )
            assert answer.logprob == pytest.approx(expected, abs=2e-4) and answer.tokens == len(
                option
            )


@pytest.mark.parametrize("stride", [None, 1, 5, 8])
def test_windows_score_every_token_once(stride):
    tokens = list(range(100, 131))
    windows = rolling_windows(tokens, 0, 8, stride)
    assert [token for window in windows for token in window.continuations[0]] == tokens
    assert all(window.longest <= 8 for window in windows)
    assert all(window.longest == 8 for window in windows[1:])  # later windows are full


class Oracle:
    """A model with known scores that counts its requests."""

    name, hash, dtype, context = "oracle", "0" * 64, "float32", 50

    def __init__(self, dies_after=math.inf):
        self.asked, self.dies_after = [], dies_after

    def answer(self, requests):
        from evals.harness import Scored

        for i, request in enumerate(requests):
            if len(self.asked) >= self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            long = len(request.context) > self.context
            known = [Scored(-float(len(option)), 1, True) for option in request.options]
            yield [(i, TooLong(len(request.context), self.context) if long else known)]


def two_turns(item):
    first = yield Choose(item.id, ("a", "bb"))
    again = yield [Choose(f"{item.id} {scored.logprob}", ("c",)) for scored in first]
    return {"acc": float(item.id != "item 3"), "seen": [answers[0].logprob for answers in again]}


def test_a_killed_run_resumes_with_equal_results(tmp_path):
    items = [Item(f"item {i}", {}) for i in range(6)] + [Item("x" * 60, {})]
    evaluation = Eval("two", 1, items, two_turns)
    expected = evaluate(evaluation, Oracle(), tmp_path / "whole" / "two.json")
    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluation, Oracle(dies_after=9), tmp_path / "killed" / "two.json")
    [answer_file] = (tmp_path / "killed" / "answers").glob("*.jsonl")
    answer_file.write_text(answer_file.read_text()[:-3])  # a partial line
    again = Oracle()
    assert evaluate(evaluation, again, tmp_path / "killed" / "two.json") == expected
    # 8 answers are cached; the partial one and the too long item are requested again
    assert len(again.asked) == 7 + 12 - 8 + 1
    assert (
        expected["n"] == 6
        and expected["too_long"]["n"] == 1
        and expected["too_long"]["ids"] == ["x" * 60]
    )
    assert expected["metrics"]["acc"]["value"] == pytest.approx(5 / 6)
    assert expected["metrics"]["acc"]["stderr"] == pytest.approx(math.sqrt(5 / 36 * 6 / 5 / 6))
    lines = [
        json.loads(line)
        for line in (tmp_path / "whole" / "two.samples.jsonl").read_text().splitlines()
    ]
    assert lines[0]["scores"]["seen"] == [-1.0, -1.0] and lines[-1]["too_long"] == 60


def test_clean_items_and_subjects(tmp_path):
    items = [Item(f"item {i}", {}, "even" if i % 2 == 0 else "odd") for i in range(5)]
    report = tmp_path / "ids.json"
    hits = [{"test_set": "two", "test_id": "item 3"}, {"test_set": "other", "test_id": "item 1"}]
    report.write_text(
        json.dumps({"documents": {"d": hits}, "settings": {"test_sets": {"two": 5, "other": 9}}})
    )
    scores = evaluate(Eval("two", 1, items, two_turns), Oracle(), tmp_path / "two.json", report)
    assert (
        scores["metrics"]["acc"]["value"] == 0.8
        and scores["clean"]["metrics"]["acc"]["value"] == 1.0
    )
    assert scores["clean"]["n"] == 4 and scores["clean"]["contaminated"] == ["item 3"]
    assert (
        scores["subjects"]["odd"]["metrics"]["acc"]["value"] == 0.5
        and scores["macro"]["acc"] == 0.75
    )
    second = evaluate(Eval("three", 1, items, two_turns), Oracle(), None, report)
    assert second["clean"] is None  # the report did not look for it
    report.write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a contamination report"):
        evaluate(Eval("two", 1, items, two_turns), Oracle(), None, report)


def test_a_mean_is_over_the_items_that_have_the_number():
    from evals.harness import Sample

    scores = [{"acc": True, "note": "x"}, {"acc": False, "part": 3.0}, {"acc": True}]
    metrics = means([Sample(str(i), "", score) for i, score in enumerate(scores)])
    assert (
        metrics["acc"].value == pytest.approx(2 / 3)
        and metrics["part"] == (3.0, None, 1)
        and set(metrics) == {"acc", "part"}
    )


def test_two_ranks_equal_one(checkpoint, rows, tmp_path):
    arguments = [
        "--checkpoint",
        str(checkpoint),
        "--data",
        str(rows / "data/store/evals"),
        "--device",
        "cpu",
        "--limit",
        "4",
    ]
    launch = [sys.executable, "-m", "scripts.launch", "--nproc_per_node=2", "-m"]
    for name, launcher in (("one", [sys.executable, "-m"]), ("two", launch)):
        command = [
            *launcher,
            "evals.eval_mmlu",
            *arguments,
            "--output",
            str(tmp_path / name / "mmlu.json"),
        ]
        done = forked.run(command, env=one_thread())
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "mmlu.json").read_text()) for name in ("one", "two"))
    assert one == two and one["n"] == 8
    assert len(list((tmp_path / "two" / "answers").glob("*.jsonl"))) == 2


def test_perplexity_of_rows_documents_and_texts(checkpoint, text_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def results_of(*more):
        arguments = [
            "--checkpoint",
            str(checkpoint),
            "--dataset",
            str(text_store),
            "--device",
            "cpu",
        ]
        monkeypatch.setattr(sys, "argv", ["x", *arguments, "--limit", "2", *more])
        eval_perplexity.main()
        return json.loads(Path("results", "step_1", "perplexity.json").read_text())

    def measure(*more):
        metrics = results_of(*more)["metrics"]
        assert all(
            set(estimate) >= {"value", "stderr"}
            for part in metrics.values()
            for estimate in part.values()
        )
        return {
            source: {name: estimate["value"] for name, estimate in part.items()}
            for source, part in metrics.items()
        }

    rows = measure("--sequence_length", "64")
    assert set(rows) == {"first", "second", "all"} and rows["all"]["tokens"] == 2 * 2 * 64
    by_rows, by_documents = (
        results_of("--sequence_length", "64"),
        results_of("--sequence_length", "64", "--stride", "64"),
    )
    assert (
        set(by_rows) <= set(by_documents)
        and by_rows["n"] == by_documents["n"] == 4
        and by_rows["dtype"] == "float32"
    )
    assert (
        by_rows["data_hashes"] == by_documents["data_hashes"] and len(by_rows["data_hashes"]) == 2
    )
    whole, sliding = (
        measure("--sequence_length", "256", "--stride", stride) for stride in ("256", "100")
    )
    assert (
        whole["all"]["tokens"] == sliding["all"]["tokens"]
        and whole["first"]["loss"] != sliding["first"]["loss"]
    )
    texts = tmp_path / "texts.jsonl"
    # Line ends for str.splitlines, not for JSON.
    words = [text(i, 60) + "\u2028\x85" for i in range(4)]
    lines = [
        json.dumps({"text": word, "source": f"s{i % 2}"}, ensure_ascii=False) + "\n"
        for i, word in enumerate(words)
    ]
    texts.write_text("".join(lines))
    metrics = measure("--dataset", str(texts))
    assert set(metrics) == {"s0", "s1", "all"}
    nats = metrics["all"]["loss"] * metrics["all"]["tokens"]
    assert metrics["all"]["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / sum(len(word.encode()) for word in words)
    )


def test_one_sentence(checkpoint, rows, tmp_path, capfd, monkeypatch):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).symlink_to(checkpoint / name)
    broken = NanoLlama(CONFIG, seed=3)
    torch.nn.init.constant_(broken.norm.weight, math.nan)
    save_hf(tmp_path / "nan", CONFIG, broken.state_dict(), torch.float32, bos=0, eos=0, pad=1)
    save_tokenizer(load_tokenizer(checkpoint), tmp_path / "nan")
    (tmp_path / "odd.jsonl").write_text('{"question": "x"}\n')
    (tmp_path / "list.jsonl").write_text('[{"question": "x"}]\n')
    data = str(rows / "data" / "store" / "evals")
    damaged = {
        "config.json": b"{",
        "tokenizer_config.json": b'"text"',
        "tokenizer.json": b"{}",
        "model.safetensors": b"",
    }
    messages = {name: f"{name} is damaged" for name in damaged} | {
        "model.safetensors": "the weight files have only 0 bytes"
    }
    for name, content in damaged.items():
        shutil.copytree(checkpoint, tmp_path / name)
        (tmp_path / name / name).write_bytes(content)
    cases = [
        *(
            (eval_hellaswag, ["--checkpoint", str(tmp_path / name), "--data", data], messages[name])
            for name in damaged
        ),
        (
            eval_hellaswag,
            ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "list.jsonl")],
            "is a list; each line",
        ),
        (
            eval_hellaswag,
            ["--checkpoint", str(tmp_path / "bare"), "--data", data],
            "has no tokenizer.json",
        ),
        (
            eval_hellaswag,
            ["--checkpoint", "nowhere", "--data", data],
            "checkpoint nowhere does not exist",
        ),
        (
            eval_hellaswag,
            ["--checkpoint", str(checkpoint), "--data", "nowhere.jsonl"],
            "nowhere.jsonl does not exist",
        ),
        (
            eval_hellaswag,
            ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "odd.jsonl")],
            "has no 'activity_label'",
        ),
        (
            eval_hellaswag,
            ["--checkpoint", str(tmp_path / "nan"), "--data", data],
            "logits that are not finite in float32",
        ),
        (
            eval_mmlu,
            ["--checkpoint", str(checkpoint), "--data", data, "--shots", "6"],
            "the data have 5",
        ),
        (
            eval_perplexity,
            ["--checkpoint", str(checkpoint), "--dataset", "nowhere"],
            "nowhere does not exist; give --dataset",
        ),
        (
            eval_mmlu,
            ["--checkpoint", str(checkpoint), "--data", data, "--device", "gpu"],
            "device 'gpu' is not available",
        ),
        (
            eval_mmlu,
            ["--checkpoint", str(checkpoint), "--data", data, "--output", str(tmp_path)],
            "is a folder; give a file",
        ),
    ]
    lines = {
        b'{"text": "caf\xe9"}': "is not JSON",
        b'["text"]': "is a list",
        b'{"text": 5}': "has no text",
        b'{"text": ""}': "is empty",
    }
    for i, (line, expected) in enumerate(lines.items()):
        (tmp_path / f"{i}.jsonl").write_bytes(line + b"\n")
        path = str(tmp_path / f"{i}.jsonl")
        cases.append(
            (eval_perplexity, ["--checkpoint", str(checkpoint), "--dataset", path], expected)
        )
    for module, arguments, expected in cases:
        monkeypatch.setattr(
            sys,
            "argv",
            ["x", "--output", str(tmp_path / "out.json"), "--device", "cpu", *arguments],
        )
        with pytest.raises(SystemExit) as exit_info:
            module.main() if module is eval_perplexity else main_of(module)
        error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert exit_info.value.code == 2 and len(error) == 1 and expected in error[0], (
            expected,
            error,
        )


HELLASWAG = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "1"}
ARC = {"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "B"}
MMLU = {"question": "a", "choices": ["b", "c", "d", "e"], "answer": 3, "subject": "s"}
TRUTH = {
    "question": "a",
    **{f"{kind}_targets": {"choices": ["b", "c"], "labels": [1, 0]} for kind in ("mc1", "mc2")},
}


@pytest.mark.parametrize(
    ("module", "name", "good", "changes"),
    [
        (
            eval_hellaswag,
            "validation",
            HELLASWAG,
            [{"label": ""}, {"label": "9"}, {"label": -1}, {"endings": "d"}, {"ctx_b": 5}],
        ),
        (
            eval_arc,
            "test",
            ARC,
            [{"choices": ["b", "c"]}, {"choices": {"text": ["b", "c"]}}, {"answerKey": "C"}],
        ),
        (
            eval_mmlu,
            "test",
            MMLU,
            [{"answer": "B"}, {"answer": 4}, {"choices": ["b", "c", "d"]}, {"question": None}],
        ),
        (
            eval_truthfulqa,
            "validation",
            TRUTH,
            [{"mc2_targets": {"choices": ["b", "c"], "labels": [0, 0]}}],
        ),
        (
            eval_truthfulqa,
            "validation",
            TRUTH,
            [{"mc1_targets": {"choices": ["b", "c"], "labels": [0, 1]}}],
        ),
    ],
)
def test_rows_of_another_schema_are_rejected(module, name, good, changes, tmp_path):
    arguments = options(tmp_path, data=str(tmp_path), shots=0, part="easy", format="letter")
    write_rows(tmp_path / f"{name}.jsonl", [good])
    assert len(module.build(arguments).items) == 1
    for change in changes:
        write_rows(tmp_path / f"{name}.jsonl", [good, {**good, **change}])
        with pytest.raises(ValueError, match=r"row 1 of the data for .* (has|which)"):
            module.build(arguments)


def main_of(module) -> None:
    from evals.run import eval_parser, main

    parser = eval_parser(module.__doc__, shots=0)
    parser.add_argument("--format", default="letter")
    main(parser, module.build)


def test_long_prompts_are_reported_not_truncated(checkpoint):
    small = load_model(checkpoint)
    small.context = 120
    long = [Item("long", {}), Item("short", {})]

    def score(item):
        yield Choose("a " * (500 if item.id == "long" else 3), (" b", " c"))
        return {"acc": 1.0}

    scores = results(Eval("t", 1, long, score), run_items(long, score, small, Cache()), small)
    assert scores["n"] == 1 and scores["too_long"]["ids"] == ["long"]
    with pytest.raises(
        ValueError, match="none of the 1 items of t fits the model's context of 120 tokens"
    ):
        results(Eval("t", 1, long[:1], score), run_items(long[:1], score, small, Cache()), small)


def test_generation_equals_transformers_and_stops(checkpoint, model):
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompts = [text(i, 4 + i) for i in range(5)]
    stops = tuple(model.tokenizer.stops)

    def score(item):
        full_text = yield Write(item.id, max_tokens=12)
        stop = full_text.text[4:6] or " "
        cut, drawn, again = yield [
            Write(item.id, (stop,), 12),
            *[Write(item.id, (), 6, temperature=1.0, seed=5)] * 2,
        ]
        return {"whole": full_text.text, "cut": cut, "stop": stop, "same": drawn == again}

    for sample in run_items([Item(prompt, {}) for prompt in prompts], score, model, Cache()):
        ids = torch.tensor([model.tokenizer.encode([sample.id])[0]])
        plain = net.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=list(stops), pad_token_id=1
        )[0, ids.shape[1] :]
        expected = model.tokenizer.decode([token for token in plain.tolist() if token not in stops])
        assert sample.scores["whole"] == expected and sample.scores["same"]
        assert (
            sample.scores["cut"].text == expected[: expected.index(sample.scores["stop"])]
            if expected[4:6]
            else True
        )

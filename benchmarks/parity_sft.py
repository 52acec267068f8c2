"""Compare our SFT loss with TRL's on a tiny model and the same conversations; print a table.

pip install -r requirements.txt -r requirements-parity.txt
python -m benchmarks.parity_sft --output benchmarks/results/parity_sft.json
"""

import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cli import CommandParser
from data.chat.rendering import TRAINING_TEMPLATE
from data.chat.tokenizer import save_chat_tokenizer
from data.tokenizers.bpe import save_tokenizer, train_tokenizer
from models.hf import save_hf
from models.nanollama import ModelConfig, NanoLlama
from training import setup
from training.settings import load_settings

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "sft.yaml"
ROW = 384  # tokens; the conversations fill two rows, or one row of twice the length
CALL = {"function": {"name": "now", "arguments": {"zone": "UTC"}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "now", "description": "The time.", "parameters": {"type": "object"}},
    }
]
CONVERSATIONS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes.", "thought": "2 and 2 are 4"},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "12:00"},
            {"role": "assistant", "content": "It is noon. " * 6},
        ],
        "tools": TOOLS,
    },
]


def write_case(folder: Path) -> Path:
    """Write a tiny base model, a byte tokenizer and the conversations; return its folder."""
    base = folder / "base"
    save_tokenizer(train_tokenizer([], 258), base)
    config = ModelConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    save_hf(
        base, config, NanoLlama(config, seed=7).state_dict(), torch.float32, bos=0, eos=0, pad=1
    )
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in CONVERSATIONS), encoding="utf-8"
    )
    return base


def overrides(folder: Path, length: int, rows: int, batch: int, *more: str) -> list[str]:
    """Return overrides of configs/sft.yaml for one step on all conversations."""
    return [
        f"chat={{sources: {{rows: {{path: {folder / 'rows.jsonl'}}}}}, "
        f"cache: {folder / 'cache'}, val_fraction: 0}}",
        f"data={{mix: {{rows: 1}}, sequence_length: {length}, "
        f"tokens_per_step: {length * rows}, micro_batch_size: {batch}}}",
        f"init_from={folder / 'base'}",
        f"log_dir={folder / 'logs'}",
        f"output_dir={folder / 'out'}",
        *(
            "steps=1",
            "parallel={dtype: float32}",
            "validation.every=0",
            "checkpoint.asynchronous=false",
        ),
        *more,
    ]


def ours(folder: Path, length: int, rows: int, batch: int) -> dict[str, float]:
    """Return loss and gradient norm of our first step, in this process."""
    from train_sft import SFTConfig, finetune

    where = Path(tempfile.mkdtemp(dir=folder))
    more = (f"log_dir={where / 'logs'}", f"output_dir={where / 'out'}")
    run = load_settings(SFTConfig, CONFIG, overrides(folder, length, rows, batch, *more))
    with setup.ranks() as device:
        finetune(run, 0, 1, device)
    first = json.loads(
        (where / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
    )
    return {"loss": first["loss"], "grad_norm": first["grad_norm"]}


def trl(folder: Path, batch: int, accumulate: int, packing: bool) -> dict[str, float]:
    """Return the same of TRL's SFTTrainer, from the same initial weights."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM, logging
    from trl import SFTConfig, SFTTrainer

    logging.set_verbosity_error()
    chat = save_chat_tokenizer(folder / "chat", folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "chat")
    tokenizer.chat_template = (folder / "chat" / TRAINING_TEMPLATE).read_text(encoding="utf-8")
    model = LlamaForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, attn_implementation="eager"
    )
    size = chat.tokenizer.get_vocab_size()
    model.resize_token_embeddings(size, mean_resizing=False)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        weight.data[258:] = weight.data[:258].mean(0)
    args = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        max_length=2 * ROW,
        packing=packing,
        assistant_only_loss=True,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [
        {"messages": row["messages"], "tools": json.dumps(row.get("tools") or [])}
        for row in CONVERSATIONS
    ]
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return {"loss": first["loss"], "grad_norm": first["grad_norm"]}


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--output", type=Path, help="write the table here as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_case(folder)
        table = {
            "ours, two rows at once": ours(folder, ROW, 2, 2),
            "ours, two rows one by one": ours(folder, ROW, 2, 1),
            "ours, one row": ours(folder, 2 * ROW, 1, 1),
            "TRL, three rows at once": trl(folder, 3, 1, False),
            "TRL, three rows one by one": trl(folder, 1, 3, False),
            "TRL, packed into one (bfd)": trl(folder, 1, 1, True),
        }
    for label, figures in table.items():
        print(f"{label:>32}  loss {figures['loss']:.6f}  gradient norm {figures['grad_norm']:.6f}")
    if args.output:
        import trl as package

        about = {
            "command": "python -m benchmarks.parity_sft",
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.platform(),
        }
        about |= {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "trl": package.__version__,
        }
        args.output.write_text(
            json.dumps({**about, "table": table}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()

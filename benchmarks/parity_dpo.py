"""Compare our preference losses with TRL's on tiny models and the same pairs; print a table.

pip install -r requirements.txt -r requirements-parity.txt
python -m benchmarks.parity_dpo --output benchmarks/results/parity_dpo.json
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cli import CommandParser
from data.chat.pair_batches import PairBatch, Pairs, make_batch
from data.chat.preferences import PairSource, PreferenceConfig, prepare
from data.chat.rendering import Chat
from data.chat.tokenizer import save_chat_tokenizer
from data.tokenizers.bpe import save_tokenizer, train_tokenizer
from models.hf import load_hf, save_hf
from models.nanollama import ModelConfig, NanoLlama
from training.preference_losses import DPOConfig, answer_logps, pair_losses, preference
from training.reference import frozen_logps

LENGTH = 256
# Short answers keep sums of log-probabilities exact to 1e-5 in fp32.
ROWS: list[dict[str, Any]] = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "Maybe 5."},
    {"prompt": "Say hello to the world.", "chosen": "Hello, world!", "rejected": "No."},
    {"prompt": "Name a colour", "chosen": "Red", "rejected": "Six"},
    {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "Lyon"},
]
# name -> our dpo settings, settings of TRL's trainer
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {"loss_types": ["sigmoid"]}),
    "sigmoid, beta 0.5": ({"beta": 0.5}, {"loss_types": ["sigmoid"], "beta": 0.5}),
    "sigmoid_norm, beta 1": (
        {"loss": "sigmoid_norm", "beta": 1.0},
        {"loss_types": ["sigmoid_norm"], "beta": 1.0},
    ),
    "ipo": ({"loss": "ipo"}, {"loss_types": ["ipo"]}),
    "hinge": ({"loss": "hinge"}, {"loss_types": ["hinge"]}),
    "robust, smoothing 0.1": (
        {"loss": "robust", "label_smoothing": 0.1},
        {"loss_types": ["robust"], "label_smoothing": 0.1},
    ),
    "apo_zero": ({"loss": "apo_zero"}, {"loss_types": ["apo_zero"]}),
    "sigmoid + sft": (
        {"sft_weight": 1.0},
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
    ),
}
SHARED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def write_case(folder: Path) -> dict[str, Pairs]:
    """Write a tiny policy, a reference and a byte tokenizer to `folder`; prepare the pairs."""
    save_tokenizer(train_tokenizer([], 258), folder / "bytes")
    for name, seed in (("policy", 7), ("reference", 8)):
        chat = save_chat_tokenizer(folder / name, folder / "bytes")
        config = ModelConfig(
            vocab_size=chat.tokenizer.get_vocab_size(),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            initializer_range=0.08,
        )
        weights = NanoLlama(config, seed=7).state_dict()
        if name == "reference":
            noise = NanoLlama(config, seed=seed).state_dict()
            weights = {key: value + 0.1 * noise[key] for key, value in weights.items()}
        save_hf(folder / name, config, weights, torch.float32, **chat.config_ids)
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8"
    )
    config = PreferenceConfig(
        {"pairs": PairSource(str(folder / "pairs.jsonl"))}, str(folder / "cache"), val_fraction=0.0
    )
    prepared = prepare(config, ["pairs"], folder / "policy", LENGTH)
    return {name: Pairs(path, "train") for name, path in prepared.items()}


def batch_of(
    pairs: dict[str, Pairs], reference: NanoLlama | None, indices: range = range(len(ROWS))
) -> PairBatch:
    """Return a training batch of some of the pairs."""
    sft_weight_per_token = len(ROWS) / sum(
        pairs["pairs"].chosen_tokens(i) for i in range(len(ROWS))
    )
    batch = make_batch(pairs, [("pairs", i) for i in indices], sft_weight_per_token, LENGTH)
    return batch if reference is None else batch._replace(reference=frozen_logps(reference, batch))


def ours(folder: Path, batch: PairBatch, settings: dict[str, Any]) -> dict[str, float]:
    """Return our means over the pairs, and the gradient norm of the mean loss."""
    model = load_hf(folder / "policy")
    loss, sums = preference(DPOConfig(**settings))(model, batch)
    (loss / len(batch.counted)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return {
        **{name: float(value) / len(batch.counted) for name, value in sums.items()},
        "grad_norm": float(norm),
    }


def trl_trainer(folder: Path, reference: str = "reference") -> Any:
    """Return TRL's DPOTrainer on the same models and pairs; it tokenizes the texts itself."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, LlamaForCausalLM, logging
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    logging.set_verbosity_error()
    disable_progress_bars()
    chat = Chat.from_folder(folder / "policy")
    rows = []
    for row in ROWS:
        prompt = chat.clean(
            {"messages": [{"role": "user", "content": row["prompt"]}]}, answered=False
        )
        rows.append({**row, "prompt": chat.render(prompt) + "<|im_start|>assistant\n"})
    models = [
        LlamaForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, attn_implementation="eager"
        )
        for name in ("policy", reference)
    ]
    args = TRLConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        max_length=LENGTH,
        beta=0.1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    return DPOTrainer(
        models[0],
        models[1],
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def theirs(
    trainer: Any, settings: dict[str, Any], indices: range = range(len(ROWS))
) -> dict[str, float]:
    """Return the loss and metrics that TRL logs for one batch."""
    arguments = {"beta": 0.1, "label_smoothing": 0.0, "loss_weights": [1.0], **settings}
    for name, value in arguments.items():
        setattr(trainer, name, value)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in indices])
    trainer._metrics["train"].clear()
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in trainer.model.parameters() if p.grad is not None]
    )
    logged = {name: trainer._metrics["train"][name][-1] for name in SHARED}
    return {"loss": float(loss.detach()), **logged, "grad_norm": float(norm)}


def trl_simpo(logps: Tensor, lengths: Tensor, settings: dict[str, Any]) -> Tensor:
    """Return TRL's SimPO loss (CPOTrainer) of two log-probabilities, both [2, n]."""
    from trl.experimental.cpo import CPOTrainer

    config = DPOConfig(loss="simpo", **settings)
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=config.margin,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    return CPOTrainer.cpo_loss(trainer, *(logps / lengths))[0]


def compare(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return loss -> {"ours": figures, "trl": figures}."""
    pairs = write_case(folder)
    reference, policy = load_hf(folder / "reference"), load_hf(folder / "policy")
    batch, trainer = batch_of(pairs, reference), trl_trainer(folder)
    table = {
        name: {"ours": ours(folder, batch, our_settings), "trl": theirs(trainer, trl_settings)}
        for name, (our_settings, trl_settings) in LOSSES.items()
    }
    same, equal = trl_trainer(folder, "policy"), batch_of(pairs, policy)
    table["policy = reference"] = {
        "ours": ours(folder, equal, {}),
        "trl": theirs(same, {"loss_types": ["sigmoid"]}),
    }
    single = range(1, 2)  # TRL's aot sorts pairs over the batch; with one pair it is cDPO
    smooth = {"label_smoothing": 0.1}
    table["cDPO, smoothing 0.1, of one pair"] = {
        "ours": ours(folder, batch_of(pairs, reference, single), smooth),
        "trl": theirs(trainer, {"loss_types": ["aot"], **smooth}, single),
    }
    with torch.no_grad():
        logps = answer_logps(policy, batch).unflatten(0, (2, -1))
    lengths = (batch.answer_positions < batch.targets.numel()).sum(1).unflatten(0, (2, -1))
    settings = {"beta": 2.0, "margin": 0.7, "label_smoothing": 0.1}
    losses = pair_losses(DPOConfig(loss="simpo", **settings), logps, lengths)
    table["simpo, beta 2, margin 0.7, smoothing 0.1"] = {
        "ours": {"loss": float(losses.mean())},
        "trl": {"loss": float(trl_simpo(logps, lengths, settings).mean())},
    }
    return table


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--output", type=Path, help="write the table here as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        table = compare(Path(name))
    for label, figures in table.items():
        our, trl = figures["ours"], figures["trl"]
        worst = max(abs(our[key] - trl[key]) for key in trl if key != "grad_norm")
        line = f"{label:>40}  loss {our['loss']:.6f}  TRL {trl['loss']:.6f}"
        line += f"  largest difference {worst:.1e}"
        norms = (
            ""
            if "grad_norm" not in trl
            else f"  gradient norm {our['grad_norm']:.6f}  TRL {trl['grad_norm']:.6f}"
        )
        print(line + norms)
    if args.output:
        import trl as package

        about = {
            "command": "python -m benchmarks.parity_dpo",
            "trl": package.__version__,
            "torch": torch.__version__,
        }
        args.output.write_text(
            json.dumps({**about, "python": sys.version.split()[0], "table": table}, indent=2)
            + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()

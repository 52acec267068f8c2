"""Names of settings in other code bases and earlier versions, mapped to ours.

settings.py answers an unknown key with its name: "batch_size_per_gpu is data.micro_batch_size
here". A key with the same name in exactly one other section needs no entry.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any

from models.nanollama import FIELD_ALIASES

RENAMED = {  # setting -> other names
    "step": "at",  # of a plan's milestone
    "steps": "num_steps max_steps train_steps num_train_steps max_train_steps max_iters",
    "chat.epochs": "epochs num_epochs num_train_epochs",
    "until": "end_step stop_step",
    "rope_theta": "rope_theta_end rope_base theta",
    "run": "run_name experiment_name exp_name",
    "phase": "phase_name stage",
    "output_dir": "output_path save_dir checkpoint_dir ckpt_dir out_dir leaves",
    "log_dir": "logging_dir",
    "resume_from": "resume resume_from_checkpoint load_from checkpoint_path",
    "init_from": "base_model pretrained_model model_name_or_path",
    "data.mix": "dataset datasets dataset_name train_dataset data_mix mixture",
    "data.store": "data_dir data_path dataset_path train_data",
    "data.sequence_length": "seq_len seq_length sequence_len max_seq_length max_length block_size "
    "context_length",
    "data.micro_batch_size": "batch_size_per_gpu batch_size_per_device micro_batch_size_per_gpu "
    "per_device_batch_size per_device_train_batch_size device_batch_size batch_size micro_batch",
    "data.tokens_per_step": "global_batch_size total_batch_size effective_batch_size "
    "train_batch_size gradient_accumulation_steps grad_accum_steps accumulation_steps "
    "tokens_per_batch global_batch_tokens batch_tokens",
    "optim": "optimizer",
    "optim.lr": "learning_rate max_lr peak_lr",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_eps adam_epsilon epsilon",
    "optim.weight_decay": "wd",
    "optim.grad_clip": "max_grad_norm grad_clip_norm gradient_clip gradient_clipping clip_grad",
    "optim.z_weight": "z_loss_weight z_loss z_loss_coef z_loss_coeff z_penalty",
    "schedule": "scheduler lr_schedule",
    "schedule.warmup_steps": "warmup warmup_ratio num_warmup_steps",
    "schedule.decay_steps": "num_decay_steps cooldown_steps",
    "schedule.total_steps": "stable_steps lr_decay_iters",
    "schedule.min_lr": "min_learning_rate min_lr_ratio final_lr",
    "schedule.decay": "lr_scheduler lr_scheduler_type decay_type lr_decay_style",
    "parallel": "fsdp distributed",
    "parallel.strategy": "sharding_strategy fsdp_sharding_strategy fsdp_strategy",
    "parallel.dtype": "mixed_precision precision bf16 torch_dtype",
    "parallel.activation_checkpointing": "gradient_checkpointing use_gradient_checkpointing",
    "parallel.compile": "torch_compile use_compile",
    "parallel.attention": "attn_implementation flash_attention use_flash_attention",
    "checkpoint": "checkpointing",
    "checkpoint.every": "save_every save_steps save_interval checkpoint_interval checkpoint_every "
    "checkpoint_steps save_freq",
    "checkpoint.keep": "keep_last keep_last_n save_total_limit max_checkpoints",
    "validation": "evaluation eval",
    "validation.every": "eval_every eval_steps eval_interval val_every val_interval eval_freq",
    "validation.batch_size": "eval_batch_size per_device_eval_batch_size",
    "log": "logging",
    "log.every": "log_every log_interval logging_steps log_steps",
    "log.wandb_project": "project project_name wandb_project_name",
    "log.wandb_run_name": "wandb_run wandb_name",
    "log.alerts.slack_webhook": "slack_webhook_url",
} | {f"model.{name}": others for name, others in FIELD_ALIASES.items() if name != "rope_theta"}
NEW_NAMES = {other: new for new, others in RENAMED.items() for other in others.split()}

ACCUMULATION = (
    "in tokens; micro-batches per step and rank = data.tokens_per_step / "
    "(data.sequence_length x data.micro_batch_size x ranks)"
)
NOTES = {  # on a setting or one of its other names, if unit or values differ
    "steps": "updates in this phase",
    "rope_theta_end": "[first, last] over the phase",
    "data.mix": "name: weight",
    "data.sequence_length": "tokens in a row",
    "data.micro_batch_size": "rows",
    "data.tokens_per_step": "in tokens: rows x data.sequence_length",
    "gradient_accumulation_steps": ACCUMULATION,
    "grad_accum_steps": ACCUMULATION,
    "accumulation_steps": ACCUMULATION,
    "tokens_per_batch": "",
    "global_batch_tokens": "",
    "batch_tokens": "",
    "warmup_ratio": "steps, not a fraction",
    "min_lr_ratio": "a learning rate, not a fraction",
    "stable_steps": "warm-up, stable part and decay together",
    "schedule.decay": "linear, cosine, 1-sqrt or power",
    "parallel.strategy": "zero2, zero3 or ddp",
    "parallel.dtype": "auto, bfloat16 or float32",
    "parallel.activation_checkpointing": "none, selective or full",
    "log.alerts.slack_webhook": "the NAME of an environment variable",
}

DATA_MIXES = {  # data set of data/corpus/sources.py -> data.mix
    "fineweb_edu": "{fineweb_edu: 1.0}",
    "pg19_and_stack_mixed": "{pg19: 0.5, the_stack_python: 0.5}",
    "gold_sources_mixed": "{open_web_math: 0.34, stackexchange: 0.33, stem_wiki: 0.33}",
}


def renamed(kind: Any, values: dict[str, Any]) -> list[str]:
    """Return one clause for each unknown key that has another name here.

    kind: the root dataclass of the config. settings.py handles misspelled keys.
    """
    return list(_renamed(kind, kind, values, ""))


def _renamed(root: Any, kind: Any, values: dict[str, Any], prefix: str) -> Iterator[str]:
    fields = _fields(kind)
    for name, value in values.items():
        key, section = str(name), None
        if key in fields:
            section = fields[key]
            if typing.get_origin(section) is tuple and isinstance(value, list):
                item = typing.get_args(section)[0]
                for i, entry in enumerate(value):
                    if isinstance(entry, dict):
                        yield from _renamed(item, item, entry, f"{prefix}{key}[{i}].")
            if not dataclasses.is_dataclass(section):
                continue
        elif target := new_name(root, key):
            note = NOTES.get(plain_name(key), NOTES.get(target, ""))
            if target == "data.mix":
                note = DATA_MIXES.get(plain_name(str(value)), note)
            yield f"{prefix}{key} is {target} here" + (f" ({note})" if note else "")
        elif difflib.get_close_matches(key, fields, n=1, cutoff=0.6):
            continue
        if isinstance(value, dict):  # a section of any name
            yield from _renamed(root, section, value, f"{prefix}{key}.")


def new_name(root: Any, key: str) -> str | None:
    """Return the setting of config `root` with this alias, or with this name in another section."""
    settings = dict.fromkeys(_settings(root))
    target = NEW_NAMES.get(plain_name(key))
    if target in settings:
        return target
    matches = [setting for setting in settings if setting.rpartition(".")[2] == plain_name(key)]
    return matches[0] if len(matches) == 1 else None


def plain_name(name: str) -> str:
    """Normalize a name for comparison: lower case, with underscores."""
    return name.lower().replace("-", "_").removesuffix("_validation")


def _settings(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the settings and sections of a config's dataclass."""
    for name, inner in _fields(kind).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(inner):
            yield from _settings(inner, f"{prefix}{name}.")


def _fields(kind: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(kind):
        return {}
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}

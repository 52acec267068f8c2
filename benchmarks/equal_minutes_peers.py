"""Peers of benchmarks/equal_minutes.py: other code bases at the size of the quickstart model.

A builder imports a peer's model and optimizer from a checkout or a package. What a peer keeps in
its script, and not in a function, is repeated here: rates, and the schedules of all but litgpt and
Trainer. Learning rates are settings; docs/lab.md has their defaults. Every peer computes in
bfloat16. No peer uses our models or optimizers.
"""

import ast
import importlib
import math
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from benchmarks.peers import (
    QUIET_TRAINER,
    hf_llama,
    hf_rows,
    in_order_trainer,
    litgpt_config,
)
from ranges import NonNegativeInt, PositiveFloat, check_fields, hints
from training.config import RunConfig

CHECKOUTS = {  # peer -> a file that its checkout must have, and where the checkout comes from
    "nanochat": ("nanochat/gpt.py", "https://github.com/karpathy/nanochat at 92d63d4"),
    "modded_nanogpt": (
        "records/track_3_optimization/train_gpt_simple.py",
        "https://github.com/KellerJordan/modded-nanogpt at f411b3d3",
    ),
    "nanogpt": ("model.py", "https://github.com/karpathy/nanoGPT at 3adf61e"),
}
PACKAGES = {  # peer -> packages that it imports, and how to install them
    "litgpt": (
        ("litgpt", "lightning", "jsonargparse", "torchmetrics"),
        "pip install --no-deps --target SOURCE litgpt==0.5.13 lightning pytorch-lightning "
        "lightning-utilities torchmetrics jsonargparse, then give --source SOURCE",
    ),
    "hf_trainer": (("transformers", "accelerate"), "pip install -r requirements.txt"),
}


class PeerRun(NamedTuple):
    """One training run of a peer. It creates a new optimizer."""

    steps: int
    batch: Callable[[int], tuple[Tensor, Tensor]]  # index of the step -> tokens, targets [rows, T]
    after_step: Callable[[Tensor | float], None]  # takes the mean loss of the step

    def follow(self, step: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        """Call step(index, tokens, targets), which returns its loss, for every step."""
        for index in range(self.steps):
            self.after_step(step(index, *self.batch(index)))


class Peer(NamedTuple):
    """A model of another code base and its training."""

    model: nn.Module  # not compiled
    losses: Callable[[Tensor, Tensor], Tensor]  # tokens, targets [rows, T] -> nats, of any shape
    train: Callable[[PeerRun], None]


@dataclass(frozen=True)
class NanochatSettings:
    """Settings of nanochat."""

    rate_scale: PositiveFloat = 10.0  # factor of all learning rates of scripts/base_train.py
    value_embeddings: bool = True


@dataclass(frozen=True)
class ModdedNanoGPTSettings:
    """Settings of modded-nanogpt's train_gpt_simple.py."""

    rate_scale: PositiveFloat = 1.0  # factor of all its learning rates


@dataclass(frozen=True)
class AdamWSettings:
    """Settings of nanoGPT and litgpt: peak rate and steps of warm-up."""

    lr: PositiveFloat = 2e-3
    warmup_steps: NonNegativeInt = 20


@dataclass(frozen=True)
class TrainerSettings(AdamWSettings):
    """Settings of Hugging Face's Trainer."""

    initializer_range: PositiveFloat = 0.05
    compile: bool = True


def nanochat(settings: NanochatSettings, source: Path, run: RunConfig, seed: int) -> Peer:
    """nanochat's GPT and MuonAdamW as in its base_train.py; heads and windows as in its runcpu.sh.

    Rates and weight decay follow its rules for the batch size and the size of the model.
    """
    os.environ["NANOCHAT_DTYPE"] = "bfloat16"  # it computes in float32 on a CPU by default
    gpt, shape, batch_tokens = (
        import_from(source, "nanochat.gpt"),
        run.model,
        run.data.tokens_per_step,
    )
    if not settings.value_embeddings:
        gpt.has_ve = lambda layer, layers: False
    config = gpt.GPTConfig(
        sequence_len=run.data.sequence_length,
        vocab_size=shape.vocab_size,
        n_layer=shape.num_hidden_layers,
        n_head=shape.num_attention_heads,
        n_kv_head=shape.num_attention_heads,
        n_embd=shape.hidden_size,
        window_pattern="L",
    )
    with torch.device("meta"):
        model = gpt.GPT(config)
        depth_12 = gpt.GPT(replace(config, n_layer=12, n_head=12, n_kv_head=12, n_embd=768))
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    model.init_weights()
    compiled = torch.compile(model, dynamic=False)

    def scaling_parameters(network: Any) -> int:
        counts = network.num_scaling_params()
        return counts["transformer_matrices"] + counts["lm_head"]

    batch_scale = math.sqrt(batch_tokens / 2**19)
    rate = settings.rate_scale * batch_scale
    decay = 0.28 * batch_scale * scaling_parameters(depth_12) / scaling_parameters(model)

    def train(work: PeerRun) -> None:
        optimizer = model.setup_optimizer(
            unembedding_lr=0.008 * rate,
            embedding_lr=0.3 * rate,
            scalar_lr=0.5 * rate,
            matrix_lr=0.02 * rate,
            weight_decay=decay,
        )

        def step(index: int, tokens: Tensor, targets: Tensor) -> Tensor:
            loss = compiled(tokens, targets)
            loss.backward()
            cooled = max(0.0, 1 - (work.steps - index) / (0.65 * work.steps))
            momentum = 0.97 - 0.07 * cooled
            if index < 400:
                momentum = 0.85 + 0.12 * index / 400
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * trapezoid(index, work.steps, 40, 0.65, 0.05)
                if group["kind"] == "muon":
                    group["momentum"] = momentum
                    group["weight_decay"] = decay * cosine(index / work.steps)
            optimizer.step()
            model.zero_grad(set_to_none=True)
            return loss.detach()

        work.follow(step)

    return Peer(model, scored(lambda tokens, _: model(tokens)), train)


def modded_nanogpt(
    settings: ModdedNanoGPTSettings, source: Path, run: RunConfig, seed: int
) -> Peer:
    """The GPT of modded-nanogpt's train_gpt_simple.py, with its Muon, AdamW and cooldown."""
    simple = definitions_of(source / CHECKOUTS["modded_nanogpt"][0])
    if not dist.is_initialized():  # its Muon gathers the parameters of all ranks
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    shape = run.model
    torch.manual_seed(seed)
    model = simple.GPT(shape.vocab_size, shape.num_hidden_layers, shape.hidden_size)
    for name, parameter in model.named_parameters():
        if name.endswith("gains"):
            nn.init.ones_(parameter)
        elif "proj" in name or name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(
                parameter, std=1 if "embed" in name else math.sqrt(0.33 / parameter.size(-1))
            )
    compiled = torch.compile(model, dynamic=False)

    def train(work: PeerRun) -> None:
        scale = settings.rate_scale
        groups = [
            {"params": [model.embed.weight], "lr": 0.7 * scale},
            {"params": [model.proj.weight], "lr": 0.004 * scale},
            {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 0.015 * scale},
        ]
        matrices = [p for p in model.blocks.parameters() if p.ndim >= 2]
        optimizers = [
            torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001, fused=True),
            simple.Muon(matrices, lr=0.025 * scale, weight_decay=0.05),
        ]
        peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

        def step(index: int, tokens: Tensor, targets: Tensor) -> Tensor:
            loss = compiled(tokens, targets)  # a sum
            loss.backward()
            for optimizer, lrs in zip(optimizers, peaks, strict=True):
                for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                    group["lr"] = lr * trapezoid(index, work.steps, 0, 0.7, 0)
                optimizer.step()
            model.zero_grad(set_to_none=True)
            return loss.detach() / targets.numel()

        work.follow(step)

    return Peer(model, model, train)


def nanogpt(settings: AdamWSettings, source: Path, run: RunConfig, seed: int) -> Peer:
    """nanoGPT's GPT, AdamW and cosine schedule as in its train.py, without biases and dropout."""
    gpt, shape = import_from(source, "model"), run.model
    torch.manual_seed(seed)
    model = gpt.GPT(
        gpt.GPTConfig(
            block_size=run.data.sequence_length,
            vocab_size=shape.vocab_size,
            n_layer=shape.num_hidden_layers,
            n_head=shape.num_attention_heads,
            n_embd=shape.hidden_size,
            dropout=0.0,
            bias=False,
        )
    )
    compiled = torch.compile(model)

    def logits(tokens: Tensor, targets: Tensor) -> Tensor:
        return model(tokens, targets.clamp_min(-1))[0]  # it ignores targets of -1

    def train(work: PeerRun) -> None:
        optimizer = model.configure_optimizers(0.1, settings.lr, (0.9, 0.95), "cpu")
        warmup, peak, least = settings.warmup_steps, settings.lr, settings.lr / 10

        def step(index: int, tokens: Tensor, targets: Tensor) -> Tensor:
            if index < warmup:
                lr = peak * (index + 1) / (warmup + 1)
            else:
                lr = least + (peak - least) * cosine((index - warmup) / (work.steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = lr
            with in_bfloat16():
                _, loss = compiled(tokens, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        work.follow(step)

    return Peer(model, scored(logits), train)


def litgpt(settings: AdamWSettings, source: Path | None, run: RunConfig, seed: int) -> Peer:
    """litgpt's GPT as its pretrain command trains it: initialization, AdamW, cosine rate."""
    require_packages("litgpt", source)
    from lightning import Fabric
    from litgpt import pretrain
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    shape = run.model
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.seed_everything(seed, verbose=False)
    model = GPT(litgpt_config(shape))
    pretrain.initialize_weights(fabric, model, shape.num_hidden_layers, shape.hidden_size)
    wrapped = fabric.setup(torch.compile(model))

    def train(work: PeerRun) -> None:
        plain = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.1
        )
        optimizer = fabric.setup_optimizers(plain)
        schedule = (settings.warmup_steps, work.steps, settings.lr / 10)

        def step(index: int, tokens: Tensor, targets: Tensor) -> Tensor:
            for group in optimizer.param_groups:
                group["lr"] = pretrain.get_lr(settings.lr, index, *schedule)
            loss = chunked_cross_entropy(wrapped(tokens), targets)
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        work.follow(step)

    return Peer(model, scored(lambda tokens, _: model(tokens)), train)


def hf_trainer(settings: TrainerSettings, source: Path | None, run: RunConfig, seed: int) -> Peer:
    """Hugging Face's LlamaForCausalLM and Trainer with its linear schedule."""
    require_packages("hf_trainer", source)
    import transformers

    torch.manual_seed(seed)
    model = hf_llama(run.model, initializer_range=settings.initializer_range)

    def train(work: PeerRun) -> None:
        losses: list[Tensor] = []
        rows = [row for index in range(work.steps) for row in hf_rows(*work.batch(index))]

        class AfterStep(transformers.TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                work.after_step(losses.pop())

        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=run.data.tokens_per_step // run.data.sequence_length,
                max_steps=work.steps,
                learning_rate=settings.lr,
                warmup_steps=settings.warmup_steps,
                weight_decay=0.1,
                adam_beta2=0.95,
                bf16=True,
                use_cpu=True,
                torch_compile=settings.compile,
                seed=seed,
                dataloader_pin_memory=False,
                **QUIET_TRAINER,
            )
            trainer = in_order_trainer(rows, losses)(
                model, arguments, train_dataset=rows, callbacks=[AfterStep()]
            )
            trainer.train()
        # It has put autocast into the model's forward; the next Trainer would nest it.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    return Peer(model, scored(lambda tokens, _: model(tokens).logits), train)


PEERS: dict[str, tuple[type, Callable[..., Peer]]] = {
    "nanochat": (NanochatSettings, nanochat),
    "modded_nanogpt": (ModdedNanoGPTSettings, modded_nanogpt),
    "nanogpt": (AdamWSettings, nanogpt),
    "litgpt": (AdamWSettings, litgpt),
    "hf_trainer": (TrainerSettings, hf_trainer),
}


def build_peer(
    name: str, words: list[str], source: Path | None, run: RunConfig, seed: int
) -> tuple[Peer, Any]:
    """Build a peer with the weights of a seed; return it and its settings.

    words: settings as key=value. source: its checkout, or the folder of its packages. ValueError
    names a wrong setting, or a checkout or package that is missing.
    """
    kind, builder = PEERS[name]
    settings = read_settings(name, kind, words)
    if name in CHECKOUTS:
        file, origin = CHECKOUTS[name]
        if source is None or not (source / file).is_file():
            given = "no --source" if source is None else f"--source {source} has no {file}"
            raise ValueError(f"{name}: {given}; clone {origin} and give its folder as --source")
    return builder(settings, source, run, seed), settings


def read_settings(name: str, kind: type, words: list[str]) -> Any:
    """Return settings of a peer from key=value; ValueError for an unknown key or a wrong value."""
    values, kinds = {}, hints(kind)
    for word in words:
        key, _, text = word.partition("=")
        if key not in kinds:
            known = ", ".join(f"{f.name}={f.default}" for f in fields(kind))
            raise ValueError(f"{word!r} is not a setting of {name}; its settings: {known}")
        values[key] = _value(text)
        if kinds[key] is bool and not isinstance(values[key], bool):
            raise ValueError(f"{word!r}: {key} must be true or false")
    settings = kind(**values)
    check_fields(settings)
    return settings


def _value(text: str) -> bool | int | float | str:
    """Parse a boolean or a number; return other text unchanged."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def require_packages(name: str, source: Path | None) -> None:
    """Make the packages of a folder importable; ValueError if the peer lacks one."""
    if source is not None and str(source) not in sys.path:
        sys.path.append(str(source))  # last: installed packages take precedence
    names, remedy = PACKAGES[name]
    if absent := [package for package in names if find_spec(package) is None]:
        raise ValueError(f"{name} needs the package {absent[0]}, which is not installed; {remedy}")


def import_from(source: Path, name: str) -> ModuleType:
    """Import a module of a checkout, whose folder is on sys.path during the import."""
    sys.path.insert(0, str(source))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(source))


def definitions_of(path: Path) -> SimpleNamespace:
    """Execute a script's imports, functions and classes, and nothing else of it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree.body = [node for node in tree.body if isinstance(node, kinds)]
    names: dict[str, Any] = {"__name__": path.stem}
    exec(compile(tree, str(path), "exec"), names)
    return SimpleNamespace(**names)


def in_bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def scored(logits: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the losses of targets [rows, T] by logits of [rows, T, vocab], under autocast."""

    def losses(tokens: Tensor, targets: Tensor) -> Tensor:
        with in_bfloat16():
            scores = logits(tokens, targets)
        return F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten(), reduction="none")

    return losses


def trapezoid(index: int, steps: int, warmup: int, decay: float, floor: float) -> float:
    """Factor of the peak rate: linear warm-up, constant, linear to `floor` over a share `decay`."""
    if index < warmup:
        return (index + 1) / warmup
    remaining = (steps - index) / (decay * steps)
    return min(1.0, floor + (1 - floor) * remaining)


def cosine(progress: float) -> float:
    """Half a period of a cosine: 1 at progress 0, and 0 at progress 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))

"""Contenders of benchmarks/train_speed.py: our loop and others', with equal weights and batches.

Each is a function of Work that trains until work.pace raises Done; it is called after every step
with the loss. Precision and optimizer are the same. Peers read their rows from memory, ours through
its loader. Packages that only a peer needs are imported inside its function.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.dataloader import PackedDataLoader, Prefetcher, Step
from data.store import open_shards
from models.hf import to_hf_config
from models.nanollama import ModelConfig, NanoLlama
from training import setup
from training.checkpoint import Checkpointer
from training.config import RunConfig, to_dict
from training.fsdp_utils import compute_dtype
from training.logger import Log
from training.loop import train
from training.objectives import next_token
from training.optimizers import OptimConfig, build_optimizer
from training.schedulers import WSDScheduler

MISSING = {
    "hf": "needs transformers and accelerate",
    "hf_default": "needs transformers and accelerate",
    "hf_compiled": "needs transformers, accelerate and a compiler",
    "liger": "needs liger-kernel, whose Triton kernels need a GPU",
    "litgpt": "needs litgpt and lightning",
    "torchtitan": "0.3.0 needs its own environment (datasets<4.8, wandb, tensorboard); "
    "no contender is written for it",
}


class Done(Exception):
    """Raised after the last step."""


class Work(NamedTuple):
    run: RunConfig
    device: torch.device
    rank: int
    world: int
    steps: int  # maximum
    # Called after each step with its loss, of this rank or of all.
    pace: Callable[[Tensor | float], None]

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.run.parallel, self.device)

    @property
    def micro_batches(self) -> int:
        return self.run.data.rows // (self.world * self.run.data.micro_batch_size)

    def loader(self, rank: int, world: int) -> PackedDataLoader:
        data = self.run.data
        shards = open_shards(
            data.store, data.mix, "train", self.run.model.vocab_size, data.min_document_tokens
        )
        shape = (data.sequence_length, data.rows, data.micro_batch_size)
        return PackedDataLoader(shards, data.mix, *shape, self.run.seed, rank, world, data.packing)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return tokens and targets of all steps, [steps * rows, T], in our loader's order."""
        loader = self.loader(0, 1)
        batches = [batch for index in range(self.steps) for batch in loader.at(index).batches]
        return torch.cat([batch.tokens for batch in batches]), torch.cat(
            [batch.targets for batch in batches]
        )

    def weights(self) -> dict[str, Tensor]:
        return NanoLlama(self.run.model, seed=self.run.seed).state_dict()

    def lr(self) -> WSDScheduler:
        return WSDScheduler(self.run.schedule, self.run.optim.lr)


def ours(work: Work, documents: bool = False) -> None:
    """Run training.loop.train without validation; documents: with the document mask."""
    run = work.run

    class Paced(Log):
        def metrics(self, metrics: dict[str, Any], last: bool = False) -> None:
            super().metrics(metrics, last)
            work.pace(metrics["loss"])

    class Loader:
        def __init__(self) -> None:
            self.ahead = Prefetcher(work.loader(work.rank, work.world), work.device)

        def at(self, batch_index: int) -> Step:
            step = self.ahead.at(batch_index)
            return (
                step
                if documents
                else step._replace(batches=[batch._replace(doc_ids=None) for batch in step.batches])
            )

    state = setup.build(run, work.device)
    checkpointer = Checkpointer(run.checkpoints, run.checkpoint, work.dtype, None, {})
    log = Paced(run.logs, run.log, work.rank == 0, to_dict(run))
    if work.rank:  # Log does nothing on other ranks
        log.metrics = (  # type: ignore[method-assign]
            lambda metrics, last=False: work.pace(metrics["loss"])
        )
    train(run, state, Loader(), next_token(run.optim.z_weight), checkpointer, log)


QUIET_TRAINER: dict[str, Any] = {  # arguments of transformers.TrainingArguments
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "remove_unused_columns": False,
}


def hf_llama(shape: ModelConfig, **entries: Any) -> Any:
    """transformers' LlamaForCausalLM in float32, with its own weights; entries: of its config."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = to_hf_config(shape, torch.float32, None, None, None)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_dict({**config, "use_cache": False, **entries})
    )


def hf_rows(tokens: Tensor, targets: Tensor) -> list[dict[str, Tensor]]:
    """Rows of tokens and targets [rows, T] as transformers' Trainer takes them."""
    return [
        {"input_ids": row, "labels": target, "shift_labels": target}
        for row, target in zip(tokens, targets, strict=True)
    ]


def in_order_trainer(rows: list[dict[str, Tensor]], losses: list[Tensor]) -> Any:
    """Make a transformers Trainer that reads rows in order and appends micro-batch losses."""
    import transformers
    from torch.utils.data import SequentialSampler

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(rows)  # type: ignore[arg-type]

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())  # over the step's target count
            return loss

    return InOrder


def hugging_face(
    work: Work, liger: bool = False, compiled: bool = False, default: bool = False
) -> None:
    """transformers' LlamaForCausalLM and Trainer: DDP, fp32 weights, autocast to the run's dtype.

    default: without autocast, as in Trainer's defaults.
    """
    import transformers

    run, pace, losses = work.run, work.pace, list[Tensor]()
    model = hf_llama(run.model)
    weights = work.weights().items()
    prefixes = {name: "" if name.startswith("lm_head.") else "model." for name, _ in weights}
    model.load_state_dict({prefixes[name] + name: value for name, value in weights})
    rows = hf_rows(*work.rows())

    class Pace(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            pace(torch.stack(losses).sum())
            losses.clear()

    schedule, cuda = work.lr(), work.device.type == "cuda"
    optimizer = build_optimizer(model, run.optim)
    arguments = transformers.TrainingArguments(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=run.data.micro_batch_size,
        gradient_accumulation_steps=work.micro_batches,
        gradient_checkpointing=run.parallel.activation_checkpointing == "full",
        max_steps=work.steps,
        max_grad_norm=run.optim.grad_clip,
        bf16=work.dtype == torch.bfloat16 and not default,
        use_cpu=not cuda,
        use_liger_kernel=liger,
        torch_compile=compiled,
        ddp_backend="nccl" if cuda else "gloo",
        dataloader_pin_memory=cuda,
        **QUIET_TRAINER,
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step) / run.optim.lr)
    in_order_trainer(rows, losses)(
        model, arguments, train_dataset=rows, optimizers=(optimizer, rate), callbacks=[Pace()]
    ).train()


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d, heads, size = config.hidden_size, config.num_attention_heads, config.resolved_head_dim
        self.size, self.eps = size, config.rms_norm_eps
        linear = {
            "q": heads * size,
            "k": config.num_key_value_heads * size,
            "v": config.num_key_value_heads * size,
        }
        self.self_attn = nn.ModuleDict(
            {f"{name}_proj": nn.Linear(d, width, bias=False) for name, width in linear.items()}
        )
        self.self_attn["o_proj"] = nn.Linear(heads * size, d, bias=False)
        wide = config.intermediate_size
        shapes = {"gate_proj": (d, wide), "up_proj": (d, wide), "down_proj": (wide, d)}
        self.mlp = nn.ModuleDict(
            {name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()}
        )
        self.input_layernorm = nn.RMSNorm(d, self.eps)
        self.post_attention_layernorm = nn.RMSNorm(d, self.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y, attention = normed(self.input_layernorm, x), self.self_attn
        q, k, v = (
            attention[name](y).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + attention["o_proj"](y.transpose(1, 2).flatten(2))
        y = normed(self.post_attention_layernorm, x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


def normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class PlainLlama(nn.Module):
    """A plain Llama with full logits for one device, with our parameter names."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        frequencies = config.rope_theta ** -(
            torch.arange(0, config.resolved_head_dim, 2) / config.resolved_head_dim
        )
        angles = torch.outer(torch.arange(config.max_position_embeddings), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x, length, device = self.embed_tokens(tokens), tokens.shape[1], tokens.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return F.cross_entropy(
            self.lm_head(normed(self.norm, x)).flatten(0, 1).float(), targets.flatten()
        )


def plain(work: Work, compiled: bool = False) -> None:
    """A plain PyTorch loop: autocast, full logits, fused AdamW, DDP over ranks."""
    model = PlainLlama(work.run.model)
    model.load_state_dict(work.weights())
    model.to(work.device)
    if compiled:
        model.compile(dynamic=False)
    autocast = (
        torch.autocast(work.device.type, torch.bfloat16)
        if work.dtype == torch.bfloat16
        else nullcontext()
    )

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        with autocast:
            return wrapped(tokens, targets)

    wrapped: nn.Module = model
    if work.world > 1:
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    follow(work, wrapped, build_optimizer(model, work.run.optim), loss_of, torch.Tensor.backward)


def litgpt_config(shape: ModelConfig) -> Any:
    """litgpt's Config of a model of this shape."""
    from litgpt.config import Config

    return Config(
        block_size=shape.max_position_embeddings,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.num_hidden_layers,
        n_head=shape.num_attention_heads,
        n_query_groups=shape.num_key_value_heads,
        n_embd=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        rope_base=int(shape.rope_theta),
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=shape.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
    )


def litgpt(work: Work) -> None:
    """litgpt's GPT and chunked_cross_entropy under Lightning Fabric; one rank."""
    from lightning import Fabric
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    run, shape = work.run, work.run.model
    if work.world > 1:
        raise ValueError("litgpt runs on one rank only; use litgpt:1")
    fabric = Fabric(
        accelerator=work.device.type,
        devices=1,
        precision="bf16-mixed" if work.dtype == torch.bfloat16 else "32-true",
    )
    model = GPT(litgpt_config(shape))
    ours, names = (
        work.weights(),
        {"embed_tokens": "transformer.wte", "norm": "transformer.ln_f", "lm_head": "lm_head"},
    )
    theirs = {f"{new}.weight": ours[f"{old}.weight"] for old, new in names.items()}
    for i in range(shape.num_hidden_layers):
        old, new = f"layers.{i}", f"transformer.h.{i}"
        theirs[f"{new}.attn.qkv.weight"] = torch.cat(
            [ours[f"{old}.self_attn.{x}_proj.weight"] for x in "qkv"]
        )
        theirs[f"{new}.attn.proj.weight"] = ours[f"{old}.self_attn.o_proj.weight"]
        theirs[f"{new}.norm_1.weight"] = ours[f"{old}.input_layernorm.weight"]
        theirs[f"{new}.norm_2.weight"] = ours[f"{old}.post_attention_layernorm.weight"]
        for a, b in (("fc_1", "gate_proj"), ("fc_2", "up_proj"), ("proj", "down_proj")):
            theirs[f"{new}.mlp.{a}.weight"] = ours[f"{old}.mlp.{b}.weight"]
    model.load_state_dict(theirs)
    undecayed = [p for name, p in model.named_parameters() if p.ndim == 1 or "wte" in name]
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "wte" not in name]
    groups = [
        {"params": decayed, "weight_decay": run.optim.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    model, optimizer = fabric.setup(model, adamw(groups, run.optim))

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        return chunked_cross_entropy(model(tokens), targets, chunk_size=0)

    follow(work, model, optimizer, loss_of, fabric.backward)


def adamw(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def follow(
    work: Work, model: Any, optimizer: Any, loss_of: Callable, backward: Callable[[Tensor], Any]
) -> None:
    """Run the loop of plain and litgpt; losses are means over equally large micro-batches."""
    tokens, targets = work.rows()
    schedule, n, size = work.lr(), work.micro_batches, work.run.data.micro_batch_size
    for step in range(work.steps):
        first = step * work.run.data.rows + work.rank * n * size
        total = torch.zeros((), device=work.device)
        for i in range(n):
            rows = slice(first + i * size, first + (i + 1) * size)
            accumulating = work.world > 1 and i < n - 1
            with model.no_sync() if accumulating else nullcontext():
                loss = loss_of(tokens[rows].to(work.device), targets[rows].to(work.device)) / n
                backward(loss)
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), work.run.optim.grad_clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        work.pace(total)


CONTENDERS: dict[str, Callable[[Work], None]] = {
    "ours": ours,
    "ours_documents": lambda work: ours(work, documents=True),
    "hf": hugging_face,
    "hf_default": lambda work: hugging_face(work, default=True),
    "hf_compiled": lambda work: hugging_face(work, compiled=True),
    "liger": lambda work: hugging_face(work, liger=True),
    "plain": plain,
    "plain_compiled": lambda work: plain(work, compiled=True),
    "litgpt": litgpt,
}


def missing(name: str, device: str) -> str | None:
    """Return why a contender cannot run on this device, or None."""
    from importlib.util import find_spec

    needs = {
        "hf": ("transformers", "accelerate"),
        "liger": ("transformers", "accelerate", "liger_kernel"),
    }
    needs |= {
        "hf_default": needs["hf"],
        "hf_compiled": needs["hf"],
        "litgpt": ("litgpt", "lightning"),
        "torchtitan": ("no such contender",),
    }
    absent = any(find_spec(package) is None for package in needs.get(name, ()))
    return MISSING[name] if absent or (name == "liger" and device == "cpu") else None

"""Plan a GGUF file: name, shape and stored location of every tensor.

Reads a Hugging Face folder of NanoLlama, Llama, Qwen3, Mixtral or Qwen3-MoE.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from models.hf import from_hf_name, read_hf_config, weight_files
from models.hf_experts import group_experts
from models.nanollama import ModelConfig

BLOCK_NAMES = {  # module of a block -> name in GGUF
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def read_config(folder: Path) -> ModelConfig:
    """Read a folder's config; ValueError names a setting that cannot be exported."""
    config = read_hf_config(folder)
    if config.kind == "moe" and (problem := config.moe.problem_of_mixtral):
        raise ValueError(
            f"{folder} cannot be exported to GGUF: it has {problem}. Chat and evaluate the "
            "checkpoint itself, or train with settings that Mixtral supports"
        )
    if config.rope_scaling is not None and config.rope_scaling.type == "llama3":
        raise ValueError(
            f"{folder} has Llama 3's rope_scaling, which this export cannot write; use llama.cpp's "
            "convert_hf_to_gguf.py, which reads the folder"
        )
    if config.rope_scaling is not None and config.rope_scaling.has_other_betas:
        raise ValueError(
            f"{folder} cannot be exported to GGUF: llama.cpp has beta_fast=32 and beta_slow=1 for "
            f"YaRN, but model.rope_scaling is {config.rope_scaling}. Chat and evaluate the "
            "checkpoint itself"
        )
    return config


def architecture(config: ModelConfig) -> str:
    """Return llama.cpp's name of the architecture; Mixtral is part of its llama."""
    if config.qk_norm:
        return "qwen3moe" if config.kind == "moe" else "qwen3"
    return "llama"


class StoredTensor(NamedTuple):
    """A tensor's location in a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Read the values as fp32, without a memory map."""
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[self.dtype]
        raw = np.fromfile(self.path, dtype, int(np.prod(self.shape)), offset=self.offset)
        if self.dtype == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        return raw.astype(np.float32).reshape(self.shape)


class StackedTensor(NamedTuple):
    """Tensors of equal shape that a GGUF file stores as one."""

    tensors: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> str:
        return self.tensors[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.tensors), *self.tensors[0].shape

    def read(self) -> np.ndarray:
        return np.stack([tensor.read() for tensor in self.tensors])


class PlannedTensor(NamedTuple):
    """A tensor of the GGUF file."""

    name: str
    stored: StoredTensor | StackedTensor
    heads: int  # heads of a q or k weight that needs `permute`, else 0


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Locate the tensors of a folder under our names; ValueError if a file is damaged."""
    tensors = {}
    for path in weight_files(folder):
        size = path.stat().st_size
        try:
            with safe_open(path, framework="np"):  # also checks shapes and offsets
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); restore it from a copy") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length < size else b""
        try:
            entries = json.loads(header)
        except ValueError:
            entries = {"": {"data_offsets": [0, size]}}
        data_start = 8 + length
        entries.pop("__metadata__", None)
        if any(data_start + entry["data_offsets"][1] > size for entry in entries.values()):
            raise ValueError(
                f"{path} is damaged: it ends before its last tensor; restore it from a copy"
            )
        for name, entry in entries.items():
            offset = data_start + entry["data_offsets"][0]
            tensor = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), offset)
            tensors[from_hf_name(name)] = tensor
    return tensors


def plan_tensors(folder: Path, config: ModelConfig) -> list[PlannedTensor]:
    """List the GGUF file's tensors in order; ValueError if the weights do not fit the config."""
    try:
        groups = group_experts(stored_tensors(folder))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; restore the model from a copy") from error
    stored: dict[str, StoredTensor | StackedTensor] = {
        name: StackedTensor(tuple(group)) if isinstance(group, list) else group
        for name, group in groups.items()
    }
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)  # llama.cpp uses token_embd
    expected = layout(config)
    different = sorted(expected.keys() ^ stored.keys())
    if different:
        raise ValueError(
            f"{folder}: config.json and the weights differ in {len(different)} tensors, "
            f"e.g. {different[0]}; restore the model from a copy"
        )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    result = []
    for name, (gguf_name, shape) in expected.items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{folder}: {name} has shape {tensor.shape}, but config.json implies {shape}"
            )
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise ValueError(
                f"{folder}: {name} is stored as {tensor.dtype}; "
                "save the model in float32 or bfloat16"
            )
        # llama.cpp rotates adjacent elements for llama and the halves of a head for qwen3.
        # Hugging Face rotates halves.
        head_count = 0 if config.qk_norm else heads.get(name.split(".")[-2], 0)
        result.append(PlannedTensor(gguf_name, tensor, head_count))
    return result


def layout(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Map our name of each tensor to its GGUF name and shape."""
    d, head_dim = config.hidden_size, config.resolved_head_dim
    ffn = config.expert_size if config.kind == "moe" else config.intermediate_size
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    feed_forward: dict[str, tuple[int, ...]] = {
        "gate_proj": (ffn, d),
        "up_proj": (ffn, d),
        "down_proj": (d, ffn),
    }
    if config.kind == "moe":
        n = config.moe.experts
        feed_forward = {"router": (n, d)} | {
            f"experts.{module}": (n, *shape) for module, shape in feed_forward.items()
        }
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        **(
            {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
            if config.qk_norm
            else {}
        ),
        "post_attention_layernorm": (d,),
        **{f"mlp.{module}": shape for module, shape in feed_forward.items()},
    }
    result: dict[str, tuple[str, tuple[int, ...]]] = {
        "embed_tokens.weight": ("token_embd.weight", (config.vocab_size, d)),
        **{
            f"layers.{i}.{module}{'' if '.experts.' in module else '.weight'}": (
                f"blk.{i}.{BLOCK_NAMES[module]}.weight",
                shape,
            )
            for i in range(config.num_hidden_layers)
            for module, shape in shapes.items()
        },
        "norm.weight": ("output_norm.weight", (d,)),
    }
    if not config.tie_word_embeddings:
        result["lm_head.weight"] = ("output.weight", (config.vocab_size, d))
    return result


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the halves of each head in q or k [heads * head_dim, D], for llama.cpp's llama."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)

"""Names and settings of experts in Hugging Face folders.

A model with experts is written as `MixtralForCausalLM`, or with qk_norm as `Qwen3MoeForCausalLM`.
A router that fits neither format is written as type nanollama_moe, which only NanoLlama reads.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from models.moe import MoEConfig
from models.nanollama import ModelConfig
from ranges import shown

OWN_TYPE = "nanollama_moe"  # also the key of config.json with all settings of the experts
SHARED_TYPES = ("mixtral", "qwen3_moe")  # model_type of folders that transformers reads, too
TYPES = (*SHARED_TYPES, OWN_TYPE)
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # our name -> Mixtral's
_FROM_MIXTRAL = {theirs: ours for ours, theirs in _MIXTRAL.items()}
_OURS = re.compile(r"(layers\.\d+)\.mlp\.experts\.(gate_proj|up_proj|down_proj)")
_THEIRS = re.compile(r"(layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
_ROUTER = re.compile(r"(layers\.\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight")


def model_type(config: ModelConfig) -> str:
    """Return the model_type of a folder with this model."""
    if config.kind == "dense":
        return "qwen3" if config.qk_norm else "llama"
    if config.moe.problem_of_mixtral:
        return OWN_TYPE
    return "qwen3_moe" if config.qk_norm else "mixtral"


def architecture(config: ModelConfig) -> str:
    """Return the name in config.json's `architectures`."""
    names = {
        "llama": "LlamaForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "mixtral": "MixtralForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        OWN_TYPE: "NanoLlamaMoE",
    }
    return names[model_type(config)]


def experts_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that describe the experts; {} for a dense model."""
    if config.kind == "dense":
        return {}
    moe, size = config.moe, config.expert_size
    fields: dict[str, Any] = {"intermediate_size": config.intermediate_size, **asdict(moe)}
    ours = {OWN_TYPE: fields, "qk_norm": config.qk_norm}
    if moe.problem_of_mixtral:
        return ours
    common = {
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": _aux_loss_coef(config),
        "output_router_logits": False,
        "sliding_window": None,
    }
    if model_type(config) == "mixtral":
        return common | {"intermediate_size": size, "num_local_experts": moe.experts} | ours
    qwen = {"num_experts": moe.experts, "moe_intermediate_size": size, "norm_topk_prob": True}
    return common | qwen | {"decoder_sparse_step": 1, "mlp_only_layers": []} | ours


def _aux_loss_coef(config: ModelConfig) -> float:
    """Convert balance_weight to transformers' coefficient.

    transformers pools the layers instead of adding them, and its shares add up to top_k, not 1.
    """
    moe = config.moe
    weight = moe.balance_weight if moe.balance == "loss" else 0.0
    return weight * config.num_hidden_layers / moe.top_k


def experts_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig that config.json's experts set; {} for a dense model.

    ValueError for unsupported settings and for keys that contradict each other.
    """
    kind = hf.get("model_type")
    if kind not in TYPES:
        return {}
    sizes = {} if kind == OWN_TYPE else _sizes(hf)
    if OWN_TYPE in hf or kind == OWN_TYPE:
        fields = _own_fields(hf)
        moe = fields["moe"]
        implied = moe.experts, moe.size(fields["intermediate_size"]), moe.top_k
        for (name, size), expected in zip(sizes.items(), implied, strict=False):
            if size != expected:
                raise ValueError(
                    f"{name}={size} contradicts {OWN_TYPE}, which implies {expected}; correct one "
                    f"of them, or remove {OWN_TYPE}"
                )
        return fields
    experts, size, top_k = sizes.values()
    normalized = kind == "mixtral" or bool(hf.get("norm_topk_prob"))
    if normalized != (top_k > 1):
        setting = "Mixtral" if kind == "mixtral" else f"norm_topk_prob={hf.get('norm_topk_prob')}"
        raise ValueError(
            f"{setting} with num_experts_per_tok={top_k} is not supported; NanoLlama normalizes "
            "the weights only of two or more experts; use another model"
        )
    moe = MoEConfig(experts=experts, top_k=top_k, expert_size=size)
    coef, layers = hf.get("router_aux_loss_coef"), hf.get("num_hidden_layers")
    if isinstance(coef, int | float) and isinstance(layers, int) and coef >= 0 and layers > 0:
        moe = replace(moe, balance_weight=coef * top_k / layers)  # the inverse of _aux_loss_coef
    # Mixtral's intermediate_size is that of an expert; Qwen3-MoE's is that of a dense network.
    return {"kind": "moe", "moe": moe} | (
        {"intermediate_size": size * top_k} if kind == "mixtral" else {}
    )


def _sizes(hf: dict[str, Any]) -> dict[str, int]:
    """Return number and width of experts and experts per token, keyed as in config.json."""
    names = ["num_local_experts", "intermediate_size", "num_experts_per_tok"]
    if hf["model_type"] == "qwen3_moe":
        if hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1:
            raise ValueError(
                "the model has layers without experts; "
                "NanoLlama has experts in every layer or in none"
            )
        names[1] = "moe_intermediate_size"
        names[0] = "num_experts" if "num_experts" in hf else "num_local_experts"
    sizes: dict[str, int] = {name: hf.get(name, 0) for name in names}
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size < 2**31:
            problem = (
                f"{name}={shown(size)} must be" if name in hf else f"{name} is missing; it must be"
            )
            raise ValueError(f"{problem} a whole number of at least 1")
    experts, top_k = sizes[names[0]], sizes["num_experts_per_tok"]
    if top_k > experts:
        raise ValueError(
            f"num_experts_per_tok={top_k} is more than {names[0]}={experts}; lower the first"
        )
    return sizes


def _own_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig in the key nanollama_moe; ValueError if it is invalid."""
    stored = hf.get(OWN_TYPE)
    names = ("intermediate_size", *MoEConfig.__dataclass_fields__)
    if not isinstance(stored, dict) or "intermediate_size" not in stored:
        raise ValueError(f"{OWN_TYPE}={shown(stored)} must be an object with intermediate_size")
    if unknown := sorted(stored.keys() - set(names)):
        raise ValueError(f"{OWN_TYPE} has an unknown key {shown(unknown[0])}; remove it")
    moe = MoEConfig(
        **{name: value for name, value in stored.items() if name != "intermediate_size"}
    )
    if type(size := stored["intermediate_size"]) is not int or size < 1:
        raise ValueError(
            f"{OWN_TYPE}.intermediate_size={shown(size)} must be a whole number of at least 1"
        )
    return {"kind": "moe", "moe": moe, "intermediate_size": size}


def split_experts(config: ModelConfig, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a parameter under its Hugging Face names, one per expert.

    Omits the router's noise, which only training uses.
    """
    kind = model_type(config)
    module = "block_sparse_moe" if kind == "mixtral" else "mlp"
    match = _OURS.fullmatch(name)
    if kind not in SHARED_TYPES:
        yield name, value
    elif match:
        projection = _MIXTRAL[match[2]] if kind == "mixtral" else match[2]
        for expert, weight in enumerate(value):
            yield f"{match[1]}.{module}.experts.{expert}.{projection}.weight", weight
    elif name.endswith(".mlp.router.weight"):
        yield name.replace(".mlp.router.", f".{module}.gate."), value
    elif not name.endswith(".noise_weight"):
        yield name, value


def our_name(name: str) -> tuple[str, int | None]:
    """Return our name of a parameter without the prefix "model.", and its expert number, if any."""
    if match := _ROUTER.fullmatch(name):
        return f"{match[1]}.mlp.router.weight", None
    if match := _THEIRS.fullmatch(name):
        projection = _FROM_MIXTRAL.get(match[3], match[3])
        return f"{match[1]}.mlp.experts.{projection}", int(match[2])
    return name, None


def group_experts(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Rename weights to our names; the experts of a layer become a list ordered by expert.

    weights: tensors, or other objects with dtype and shape. ValueError if an expert is missing, or
    has another dtype or shape.
    """
    result: dict[str, Any] = {}
    experts: dict[str, dict[int, Any]] = {}
    for theirs, value in weights.items():
        name, expert = our_name(theirs)
        if expert is None:
            result[name] = value
        else:
            experts.setdefault(name, {})[expert] = value
    for name, numbered in experts.items():
        shapes = {(weight.dtype, tuple(weight.shape)) for weight in numbered.values()}
        if numbered.keys() != set(range(len(numbered))) or len(shapes) > 1:
            raise ValueError(f"{name}: an expert is missing or differs in dtype or shape")
        result[name] = [numbered[i] for i in range(len(numbered))]
    return result


def stack_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights to our names and stack the experts: [E, ...]. Errors: see group_experts."""
    return {
        name: torch.stack(value) if isinstance(value, list) else value
        for name, value in group_experts(weights).items()
    }

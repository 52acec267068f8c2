"""Read and write Hugging Face model folders: config.json, model.safetensors, parameter names.

NanoLlama is written as `LlamaForCausalLM`, or with qk_norm as `Qwen3ForCausalLM`; with experts as
`MixtralForCausalLM` or `Qwen3MoeForCausalLM` (models/hf_experts.py). All four are read.
"""

import errno
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from files import checkpoint_advice, newest_step, read_json, read_object
from models import hf_experts
from models.kinds import AnyConfig, AnyModel
from models.nanollama import ModelConfig, NanoLlama
from models.rope import rope_section, scaling_from_hf, unsupported_rope
from models.speedrun_config import GPTConfig
from ranges import MAX_INT, shown

_SHARED = (  # fields of ModelConfig with the same name in config.json
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
)
TYPES = ("llama", "qwen3")  # model_type of dense folders
_CONTEXTS = {"llama": 2048, "mixtral": 131_072}  # transformers' default; Qwen3: 32,768
_MIXTRAL = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5}  # transformers' defaults
_FLOATS = ("rms_norm_eps", "initializer_range", "rope_theta")


def resolve_checkpoint(path: str) -> Path:
    """Resolve a --checkpoint argument: a phase folder becomes its newest step_N model folder."""
    return newest_step(Path(path), "config.json")


def check_model_folder(folder: Path) -> None:
    """ValueError unless a folder has a config.json: it is missing, or not a checkpoint."""
    if (folder / "config.json").is_file():
        return
    _refuse_adapter(folder)
    advice = download_advice(folder)
    if not folder.exists():
        raise ValueError(f"checkpoint {folder} does not exist; {advice or 'check the path'}")
    advice = advice or checkpoint_advice(folder)
    raise ValueError(f"{folder} is not a checkpoint: it has no config.json; {advice}")


def _refuse_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter, not a model; "
            "merge it into its base model (PEFT's merge_and_unload)"
        )


def download_advice(folder: Path) -> str:
    """Return the command that downloads a model of the hub; "" unless `folder` is owner/name."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", folder.as_posix()) or folder.parent.exists():
        return ""
    command = f"hf download {folder} --local-dir {folder.name}"
    return f"if it is a model of the hub, run {command} and give {folder.name}"


def to_hf_config(
    config: AnyConfig,
    dtype: torch.dtype,
    bos: int | None,
    eos: int | list[int] | None,
    pad: int | None,
) -> dict[str, Any]:
    """Build the content of config.json.

    Rotary positions have both spellings: `rope_parameters` (transformers 5), and `rope_theta` and
    `rope_scaling` (4). A SpeedrunGPT, which transformers does not know, is written with the fields
    of its GPTConfig.
    """
    if isinstance(config, GPTConfig):
        return {
            "architectures": ["SpeedrunGPT"],
            "model_type": config.model_type,
            **asdict(config),
            "dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": bos,
        }
    scaling = config.rope_scaling
    return {
        "architectures": [hf_experts.architecture(config)],
        "model_type": hf_experts.model_type(config),
        **{name: getattr(config, name) for name in _SHARED},
        **hf_experts.experts_to_hf(config),
        "rope_theta": config.rope_theta,
        **({} if scaling is None else {"rope_scaling": scaling.to_hf()}),
        "rope_parameters": {
            "rope_theta": config.rope_theta,
            **({"rope_type": "default"} if scaling is None else scaling.to_hf()),
        },
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }


def from_hf_config(hf: dict[str, Any]) -> ModelConfig:
    """Convert the config.json of Llama, Qwen3, Mixtral, Qwen3-MoE or NanoLlama with experts.

    ValueError names each unsupported setting.
    """
    model_type = hf.get("model_type")
    if model_type == GPTConfig.model_type:
        raise ValueError(
            "the model is a SpeedrunGPT, which only train_gpt.py reads; chat, evaluations and "
            "export need a Llama, Qwen3, Mixtral or Qwen3-MoE folder"
        )
    if model_type not in (*TYPES, *hf_experts.TYPES):
        raise ValueError(
            f"model_type {model_type!r} is not supported; NanoLlama reads folders of "
            f"{', '.join((*TYPES, *hf_experts.SHARED_TYPES))}"
        )
    rope = rope_section(hf)
    unsupported = {
        **unsupported_rope(rope),
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(hf.get("attention_bias")),
        "mlp_bias": bool(hf.get("mlp_bias")),
        "use_sliding_window": bool(hf.get("use_sliding_window")),
        "sliding_window": model_type == "mixtral" and bool(hf.get("sliding_window")),
        "quantization_config": bool(hf.get("quantization_config")),
    }
    if any(unsupported.values()):
        names = ", ".join(name for name, is_set in unsupported.items() if is_set)
        raise ValueError(f"NanoLlama does not support this model's {names}; use another model")
    default_theta = 1_000_000.0 if model_type == "mixtral" else 10_000.0
    theta = rope.get("rope_theta", hf.get("rope_theta", default_theta))
    fields = {
        name: hf[name]
        for name in _SHARED
        if hf.get(name) is not None or (name == "head_dim" and name in hf)
    }
    missing = [name for name in _SHARED[:5] if name not in fields]
    if missing:
        raise ValueError(f"config.json has no {missing[0]}; restore it from a copy")
    for name, value in {**fields, "rope_theta": theta}.items():
        kind = bool if name == "tie_word_embeddings" else int | float if name in _FLOATS else int
        wrong = (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind)
        wrong = wrong or (type(value) is int and abs(value) >= MAX_INT)
        if wrong and not (name == "head_dim" and value is None):
            raise ValueError(
                f"{name}={shown(value)} in config.json has the wrong type or size; correct it"
            )
    fields |= hf_experts.experts_from_hf(hf)
    # A missing key has transformers' default, which may differ from ModelConfig's.
    if model_type == "mixtral":
        fields = _MIXTRAL | fields
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("rms_norm_eps", 1e-6)
    fields.setdefault("max_position_embeddings", _CONTEXTS.get(model_type, 32_768))
    fields.setdefault("tie_word_embeddings", False)
    if model_type == "qwen3":
        fields.setdefault("head_dim", 128)
    qk_norm = hf.get("qk_norm") if model_type == hf_experts.OWN_TYPE else "qwen3" in model_type
    if not isinstance(qk_norm, bool):
        raise ValueError(f"qk_norm={shown(qk_norm)} in config.json must be true or false")
    scaling = scaling_from_hf(hf, fields["max_position_embeddings"])
    return ModelConfig(**fields, rope_theta=float(theta), rope_scaling=scaling, qk_norm=qk_norm)


def to_hf_tensors(
    config: AnyConfig, weights: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Convert full tensors under our names to those of a Hugging Face folder, in `dtype`."""
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        named = [(name, value)]
        if isinstance(config, ModelConfig):
            named = list(hf_experts.split_experts(config, name, value))
        for key, tensor in named:
            hf_name = key if key.startswith("lm_head.") else f"model.{key}"
            tensors[hf_name] = tensor.detach().to("cpu", stored_dtype(key, dtype)).contiguous()
    return tensors


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a stored weight: float32 for router biases, else `dtype`.

    bfloat16 would round away the small differences between biases that choose the experts.
    """
    return torch.float32 if name.endswith(".router.bias") else dtype


def from_hf_name(name: str) -> str:
    """Remove the prefix "model." from a parameter name of a Hugging Face folder."""
    return name.removeprefix("model.")


def save_hf(
    folder: Path,
    config: AnyConfig,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    bos: int | None = None,
    eos: int | list[int] | None = None,
    pad: int | None = None,
    **extra: object,
) -> None:
    """Write config.json and model.safetensors.

    weights: full tensors under our names, cast to dtype. extra: additional keys of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hf_config = {**to_hf_config(config, dtype, bos, eos, pad), **extra}
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
    tensors = to_hf_tensors(config, weights, dtype)
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(
            errno.ENOSPC,
            f"{folder / 'model.safetensors'} could not be written ({error}); is the disk full?",
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """List a folder's safetensors files, sharded or not; ValueError if one is missing."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in weight_map.values()
        ):
            raise ValueError(
                f"{index} is damaged: its weight_map does not name files of this folder"
            )
        files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {missing[0]}; give a folder that save_pretrained or train.py wrote"
        )
    return [folder / name for name in files]


def read_hf_weights(folder: Path) -> dict[str, Tensor]:
    """Read a folder's weights under our names, in their stored dtype.

    Experts are stacked. ValueError if a file or an expert is missing or damaged.
    """
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            weights |= {from_hf_name(name): value for name, value in load_file(path).items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); restore it from a copy") from error
    try:
        return hf_experts.stack_experts(weights)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; restore the model from a copy") from error


def read_hf_config(folder: Path) -> ModelConfig:
    """Read a folder's config.json as a ModelConfig; ValueError names the file and the key."""
    content = config_json(folder)
    try:
        return from_hf_config(content)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def read_config(folder: Path) -> AnyConfig:
    """Read a folder's config.json as a ModelConfig or GPTConfig; ValueError if it is invalid."""
    content = config_json(folder)
    if content.get("model_type") != GPTConfig.model_type:
        return read_hf_config(folder)
    names = GPTConfig.__dataclass_fields__
    try:
        return GPTConfig(**{name: value for name, value in content.items() if name in names})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def config_json(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json; ValueError if it is missing or damaged."""
    check_model_folder(folder)
    return read_json(folder / "config.json")


def load_weights(model: AnyModel, folder: Path, new_tokens: range | None = None) -> None:
    """Copy a folder's weights into an unsharded model; ValueError if names or shapes differ.

    new_tokens: token ids that the folder's tokenizer lacks; grow_vocabulary initializes their rows.
    """
    weights = read_hf_weights(folder)
    if new_tokens is not None:
        for name in ("embed_tokens.weight", "lm_head.weight"):
            if name in weights:
                weights[name] = grow_vocabulary(weights[name], new_tokens, model.config.vocab_size)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    parameters = model.state_dict()
    model_type = (read_object(folder / "config.json") or {}).get("model_type")
    if model_type in hf_experts.SHARED_TYPES:  # these formats store no router noise or bias
        for name, value in parameters.items():
            if name.endswith((".router.noise_weight", ".router.bias")):
                weights[name] = torch.zeros_like(value)  # as at the start of training
    for name in [name for name in weights if name.endswith(".router.noise_weight")]:
        if name not in parameters:  # the model's router has no noise
            del weights[name]
    if parameters.keys() != weights.keys():
        names = sorted(parameters.keys() ^ weights.keys())
        raise ValueError(
            f"{folder} and the model differ in {len(names)} weights, e.g. {names[0]}; "
            "correct the model section of the config"
        )
    for name, value in weights.items():
        if value.shape != (shape := parameters[name].shape):
            raise ValueError(
                f"{name} is {tuple(value.shape)} in {folder} but {tuple(shape)} in the model; "
                "correct the model section of the config"
            )
    model.load_state_dict(weights)


def grow_vocabulary(weight: Tensor, new: range, size: int) -> Tensor:
    """Resize a weight [rows, D] to [size, D].

    Rows of `new` ids and appended rows become the mean of the rows before `new`; the other
    rows are unchanged.
    """
    mean = weight[: new.start].float().mean(0).to(weight.dtype)
    grown = torch.cat([weight[:size], mean.expand(max(0, size - len(weight)), -1)])
    grown[new.start : new.stop] = mean
    return grown


def load_hf(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> NanoLlama:
    """Load a Hugging Face folder as a NanoLlama; ValueError if it is damaged or not supported.

    dtype: of the parameters; None: their stored dtype.
    """
    folder = Path(folder)
    stored = config_json(folder)
    config = read_hf_config(folder)
    size = sum(path.stat().st_size for path in weight_files(folder))
    if config.num_parameters > size:  # checked before allocation
        raise ValueError(
            f"{folder}: config.json describes {config.num_parameters:,} parameters, "
            f"but the weight files have only {size:,} bytes; copy the folder again"
        )
    model = NanoLlama(config)
    load_weights(model, folder)
    if dtype is None:
        name = stored.get("dtype") or stored.get("torch_dtype") or "float32"
        if name not in ("float32", "float16", "bfloat16", "float64"):
            raise ValueError(
                f"{folder}: config.json has the dtype {str(name)[:50]!r}; "
                "use a folder in float32, float16 or bfloat16"
            )
        dtype = getattr(torch, name)
    for parameter in model.parameters():  # model.to(dtype) would convert the rotary tables too
        parameter.data = parameter.data.to(dtype)
    return model.to(device)

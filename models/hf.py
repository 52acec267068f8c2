"""To and from a Hugging Face folder: config.json, model.safetensors, parameter names.

NanoLlama exports as `LlamaForCausalLM`, or as `Qwen3ForCausalLM` with qk_norm; both are read back.
"""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from files import parse_object
from models.nanollama import ModelConfig, NanoLlama
from ranges import MAX_INT, shown

_SHARED = (  # fields that bear the same name on both sides
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


_REAL = ("rms_norm_eps", "initializer_range", "rope_theta")


def newest_step(path: str) -> Path:
    """The path; of a folder that holds no model but step_N folders that do, the newest of them. What --checkpoint flags take."""
    folder = Path(path)
    steps = [
        step
        for step in folder.glob("step_*")
        if step.name[5:].isdigit() and (step / "config.json").is_file()
    ]
    if (folder / "config.json").is_file() or not steps:
        return folder
    return max(steps, key=lambda step: int(step.name[5:]))


def check_model_folder(folder: Path) -> None:
    """ValueError where a folder is no checkpoint."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint: it holds no config.json")


def to_hf_config(
    config: ModelConfig, dtype: torch.dtype, bos: int | None, eos: int | None, pad: int | None
) -> dict:
    """The content of config.json. theta stands under both names: `rope_parameters` (transformers 5) and `rope_theta` (4)."""
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        **{name: getattr(config, name) for name in _SHARED},
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
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


def from_hf_config(hf: dict) -> ModelConfig:
    """ModelConfig of a Llama or Qwen3 config.json; ValueError names what NanoLlama has no counterpart for."""
    kind = hf.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise ValueError(
            f"model_type {kind!r} is not supported; NanoLlama reads llama and qwen3 folders"
        )
    parts = [hf.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("rope_scaling and rope_parameters of config.json must be objects")
    rope = {**parts[0], **parts[1]}
    odd = {
        "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(hf.get("attention_bias")),
        "mlp_bias": bool(hf.get("mlp_bias")),
        "use_sliding_window": bool(hf.get("use_sliding_window")),
        "quantization_config": bool(hf.get("quantization_config")),
    }
    if any(odd.values()):
        raise ValueError(
            f"NanoLlama has no counterpart for this model's {', '.join(k for k, v in odd.items() if v)}"
        )
    theta = rope.get("rope_theta", hf.get("rope_theta", 10_000.0))
    fields = {
        name: hf[name]
        for name in _SHARED
        if hf.get(name) is not None or (name == "head_dim" and name in hf)
    }
    missing = [name for name in _SHARED[:5] if name not in fields]
    if missing:
        raise ValueError(f"config.json has no {missing[0]}")
    for name, value in {**fields, "rope_theta": theta}.items():
        right = bool if name == "tie_word_embeddings" else int | float if name in _REAL else int
        wrong = (isinstance(value, bool) and right is not bool) or not isinstance(value, right)
        wrong = wrong or (type(value) is int and abs(value) >= MAX_INT)
        if wrong and not (name == "head_dim" and value is None):
            raise ValueError(f"{name} of config.json is {shown(value)}, of the wrong type or size")
    # Where a key is missing, the default is transformers' own, not ours.
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("rms_norm_eps", 1e-6)
    fields.setdefault("max_position_embeddings", 2048 if kind == "llama" else 32_768)
    fields.setdefault("tie_word_embeddings", False)
    if kind == "qwen3":
        fields.setdefault("head_dim", 128)
    return ModelConfig(**fields, rope_theta=float(theta), qk_norm=kind == "qwen3")


def to_hf_name(name: str) -> str:
    """Name of one of our parameters in a Hugging Face state dict."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def from_hf_name(name: str) -> str:
    return name.removeprefix("model.")


def save_hf(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    bos: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
    **more: object,
) -> None:
    """Write config.json and model.safetensors of `weights` (our names, whole tensors) cast to dtype. more: further keys."""
    folder.mkdir(parents=True, exist_ok=True)
    hf_config = {**to_hf_config(config, dtype, bos, eos, pad), **more}
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
    tensors = {
        to_hf_name(name): value.detach().to("cpu", dtype).contiguous()
        for name, value in weights.items()
    }
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # what a full disk becomes in there
        raise OSError(
            errno.ENOSPC,
            f"{folder / 'model.safetensors'} could not be written ({error}); is the disk full?",
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, one, or those that an index names; ValueError where one is missing."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        named = _json(index).get("weight_map")
        if not isinstance(named, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in named.values()
        ):
            raise ValueError(
                f"{index} is damaged: its weight_map does not name files of this folder"
            )
        files = sorted(set(named.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} holds no {missing[0]}; give a folder that save_pretrained or train.py wrote"
        )
    return [folder / name for name in files]


def read_hf_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a Hugging Face folder under our names, whole or split by an index, in their stored dtype.

    ValueError where a file is missing or damaged.
    """
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            weights |= {from_hf_name(name): value for name, value in load_file(path).items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); take another copy of it") from error
    return weights


def read_hf_config(
    folder: Path, make: Callable[[dict], ModelConfig] = from_hf_config
) -> ModelConfig:
    """The config that `make` makes of a folder's config.json; ValueError names the file and the wrong key."""
    content = config_json(folder)
    try:
        return make(content)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def config_json(folder: Path) -> dict:
    """What a folder's config.json says; ValueError where there is none, or a damaged one."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder} holds an adapter, not a model; merge it into its base model (PEFT's merge_and_unload)"
            )
        raise ValueError(
            f"{folder} holds no config.json; give a folder that save_pretrained or train.py wrote"
        )
    return _json(path)


def _json(path: Path) -> dict:
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: it is no JSON object ({error}); take another copy of it"
        ) from error


def load_weights(model: NanoLlama, folder: Path, new_tokens: range | None = None) -> None:
    """Copy a folder's weights into a model that is not yet sharded; ValueError where names or shapes do not fit.

    new_tokens: ids that the model's tokenizer has and the folder's lacks; their rows of embedding and head are set.
    """
    weights = read_hf_weights(folder)
    if new_tokens is not None:
        for name in ("embed_tokens.weight", "lm_head.weight"):
            if name in weights:
                weights[name] = grow_vocabulary(weights[name], new_tokens, model.config.vocab_size)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    own = model.state_dict()
    if own.keys() != weights.keys():
        names = sorted(own.keys() ^ weights.keys())
        raise ValueError(
            f"{folder} and the model differ in {len(names)} weights, among them {names[0]}"
        )
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)} in {folder} but {tuple(own[name].shape)} in the model; "
                "make the model section of the config agree with the checkpoint"
            )
    model.load_state_dict(weights)


def grow_vocabulary(weight: Tensor, new: range, size: int) -> Tensor:
    """A weight [rows, D] as [size, D]. The rows of new ids, and all after the old ones, are the mean of the rows before `new`.

    All other rows stay, also unused ones.
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
    """The model of a Hugging Face folder. dtype of the parameters: None stands for the one they are stored in."""
    folder = Path(folder)
    stored = config_json(folder)
    config = read_hf_config(folder)
    size = sum(path.stat().st_size for path in weight_files(folder))
    if config.num_parameters > size:  # before memory is taken for them
        raise ValueError(
            f"{folder}: config.json asks for {config.num_parameters:,} parameters; the weights have {size:,} bytes"
        )
    model = NanoLlama(config)
    load_weights(model, folder)
    if dtype is None:
        name = stored.get("dtype") or stored.get("torch_dtype") or "float32"
        dtype = (
            getattr(torch, name, None)
            if name in ("float32", "float16", "bfloat16", "float64")
            else None
        )
        if dtype is None:
            raise ValueError(
                f"{folder}: config.json names the dtype {str(name)[:50]!r}; float32, float16 and bfloat16 are read"
            )
    for parameter in model.parameters():  # not model.to(dtype): the rotary tables stay fp32
        parameter.data = parameter.data.to(dtype)
    return model.to(device)

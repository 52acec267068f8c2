"""From a Hugging Face folder to GGUF files, tensor by tensor: names, llama.cpp's order of q and k, the type each tensor takes.

Types and fallbacks are those of llama.cpp's quantiser (llama-quant.cpp), weights are quantised from what is stored, never from
f16. Needs the gguf package; q4_k_m takes its rows from a llama.cpp library (inference/llamacpp.py) or from libgguf.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from files import sweep, temporary
from models.hf import from_hf_config, from_hf_name, read_hf_config, weight_files
from models.nanollama import ModelConfig, Size

OUTTYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_k_m": "MOSTLY_Q4_K_M",
}
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where rows are no multiple of 256
OF_EIGHT = {
    "attn_k": "Q8_0",
    "attn_v": "Q8_0",
    "attn_output": "Q5_K",
}  # in q4_k_m, where there are 8 experts
EXPERT = re.compile(r"(layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+\.weight)")
SLAB = 2**20  # weights that a thread quantises at a time
BLOCK = {
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
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
Quantise = Callable[
    [np.ndarray, int], np.ndarray
]  # fp32 [rows, width], ggml's number of a type -> uint8 [rows, bytes]


@dataclass(frozen=True)
class MoeConfig(ModelConfig):
    """The shape of a Qwen3-MoE, whose feed-forwards are all of experts. We have no such model: it is exported only."""

    num_experts: Size = 128
    num_experts_per_tok: Size = 8
    moe_intermediate_size: Size = 768

    @property
    def num_parameters(self) -> int:
        expert = (
            3 * self.hidden_size * self.moe_intermediate_size + self.hidden_size
        )  # with its row of the router
        dense = 3 * self.hidden_size * self.intermediate_size
        return super().num_parameters + self.num_hidden_layers * (self.num_experts * expert - dense)


def read_config(folder: Path) -> ModelConfig:
    """The config of a folder that can be exported; ValueError names what llama.cpp or NanoLlama has no counterpart for."""
    return read_hf_config(folder, _from_config)


def _from_config(hf: dict) -> ModelConfig:
    if hf.get("model_type") != "qwen3_moe":
        return from_hf_config(hf)
    if hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            "the model has layers without experts; only models with experts in every layer are exported"
        )
    if not hf.get("norm_topk_prob"):
        raise ValueError(
            "norm_topk_prob is false, but llama.cpp always makes the chosen experts' weights add up to 1"
        )
    # As a Llama, whose head_dim is hidden_size / num_attention_heads unless it is given; Qwen3's own default is 128.
    dense = replace(
        from_hf_config({"max_position_embeddings": 32_768, **hf, "model_type": "llama"}),
        qk_norm=True,
    )
    own = {
        name: hf[name] for name in ("num_experts_per_tok", "moe_intermediate_size") if name in hf
    }
    return MoeConfig(
        **asdict(dense), num_experts=hf.get("num_experts", hf.get("num_local_experts", 128)), **own
    )


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of it."""
    return "qwen3moe" if isinstance(config, MoeConfig) else "qwen3" if config.qk_norm else "llama"


class Stored(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Its values in fp32; 2 or 4 bytes each are read, and nothing is mapped."""
        kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[self.dtype]
        raw = np.fromfile(self.path, kind, int(np.prod(self.shape)), offset=self.offset)
        values = (
            (raw.astype(np.uint32) << 16).view(np.float32)
            if self.dtype == "BF16"
            else raw.astype(np.float32)
        )
        return values.reshape(self.shape)


class Stacked(NamedTuple):
    """Tensors of one shape that lie in a GGUF file as one."""

    parts: tuple[Stored, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.parts), *self.parts[0].shape

    def read(self) -> np.ndarray:
        return np.stack([part.read() for part in self.parts])


class Planned(NamedTuple):
    """A tensor of the file that is written."""

    name: str
    stored: Stored | Stacked
    heads: int  # of q or k where rows must be put in ggml's order, else 0


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's safetensors files under our names; ValueError where a file is damaged."""
    found = {}
    for path in weight_files(folder):
        size = path.stat().st_size
        try:
            with safe_open(path, framework="np"):  # checks that shapes and offsets fit the file
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); take another copy of it") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length < size else b""
        try:
            entries = json.loads(header)
        except ValueError:
            entries = {"": {"data_offsets": [0, size]}}
        begin = 8 + length
        if any(
            begin + entry["data_offsets"][1] > size
            for name, entry in entries.items()
            if name != "__metadata__"
        ):
            raise ValueError(
                f"{path} is damaged: it ends before its tensors do; take another copy of it"
            )
        for name, entry in entries.items():
            if name != "__metadata__":
                where = Stored(
                    path, entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0]
                )
                found[from_hf_name(name)] = where
    return found


def stack_experts(stored: Mapping[str, Stored]) -> dict[str, Stored | Stacked]:
    """The tensors, those of a layer's experts as one: mlp.experts.3.up_proj is part 3 of mlp.experts.up_proj."""
    result: dict[str, Stored | Stacked] = {}
    experts: dict[str, dict[int, Stored]] = {}
    for name, tensor in stored.items():
        if found := EXPERT.fullmatch(name):
            experts.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = tensor
        else:
            result[name] = tensor
    for name, parts in experts.items():
        if (
            set(parts) != set(range(len(parts)))
            or len({(part.dtype, part.shape) for part in parts.values()}) > 1
        ):
            raise ValueError(
                f"{name}: an expert is missing, or unlike the others; take another copy of the model"
            )
        result[name] = Stacked(tuple(parts[i] for i in sorted(parts)))
    return result


def plan(folder: Path, config: ModelConfig) -> list[Planned]:
    """What the file will hold, in its order; ValueError where the folder's tensors are not those of its config."""
    stored = stack_experts(stored_tensors(folder))
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)  # llama.cpp takes token_embd for it
    wanted = layout(config)
    odd = sorted(wanted.keys() ^ stored.keys())
    if odd:
        raise ValueError(
            f"{folder}: config.json and the weights do not agree in {len(odd)} tensors, among them {odd[0]}"
        )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    result = []
    for name, (new, shape) in wanted.items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise ValueError(f"{folder}: {name} is {tensor.shape}, but {shape} by config.json")
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise ValueError(
                f"{folder}: {name} is stored as {tensor.dtype}; save the model in float32 or bfloat16"
            )
        # arch llama rotates neighbours, Hugging Face the two halves of a head; arch qwen3 rotates halves too
        result.append(
            Planned(new, tensor, 0 if config.qk_norm else heads.get(name.split(".")[-2], 0))
        )
    return result


def layout(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name of each tensor -> its name in GGUF and its shape."""
    d, ffn, size = config.hidden_size, config.intermediate_size, config.resolved_head_dim
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    feed_forward: dict[str, tuple[int, ...]] = {
        "gate_proj": (ffn, d),
        "up_proj": (ffn, d),
        "down_proj": (d, ffn),
    }
    if isinstance(config, MoeConfig):
        n, ffn = config.num_experts, config.moe_intermediate_size
        feed_forward = {
            "gate": (n, d),
            "experts.gate_proj": (n, ffn, d),
            "experts.up_proj": (n, ffn, d),
        }
        feed_forward["experts.down_proj"] = (n, d, ffn)
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        **({"self_attn.q_norm": (size,), "self_attn.k_norm": (size,)} if config.qk_norm else {}),
        "post_attention_layernorm": (d,),
        **{f"mlp.{part}": shape for part, shape in feed_forward.items()},
    }
    result: dict[str, tuple[str, tuple[int, ...]]] = {
        "embed_tokens.weight": ("token_embd.weight", (config.vocab_size, d)),
        **{
            f"layers.{i}.{part}.weight": (f"blk.{i}.{BLOCK[part]}.weight", shape)
            for i in range(config.num_hidden_layers)
            for part, shape in shapes.items()
        },
        "norm.weight": ("output_norm.weight", (d,)),
    }
    if not config.tie_word_embeddings:
        result["lm_head.weight"] = ("output.weight", (config.vocab_size, d))
    return result


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * head_dim, D] with the two halves of each head interleaved, as arch llama rotates them."""
    return np.ascontiguousarray(
        weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2)
    ).reshape(weight.shape)


def tensor_type(outtype: str, name: str, shape: tuple[int, ...], config: ModelConfig) -> str:
    """ggml's name of the type that a tensor takes in a file of this outtype, as llama.cpp decides it."""
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return "F32"
    if outtype in ("f32", "f16", "bf16"):
        return outtype.upper()
    kind = "Q8_0"
    if outtype == "q4_k_m":
        kind = "Q4_K"
        if name == "output.weight" or (name == "token_embd.weight" and config.tie_word_embeddings):
            kind = "Q6_K"
        elif name.endswith(("attn_v.weight", "ffn_down.weight", "ffn_down_exps.weight")):
            layer, layers = int(name.split(".")[1]), config.num_hidden_layers
            more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
            kind = "Q6_K" if more else "Q4_K"
        if isinstance(config, MoeConfig) and config.num_experts == 8:
            kind = OF_EIGHT.get(name.split(".")[-2], kind)
        kind = FALLBACK.get(kind, kind) if shape[-1] % 256 else kind
    return "F16" if shape[-1] % 32 else kind


def export(
    folder: Path,
    targets: Mapping[str, Path],
    vocabulary: Callable[[Any], None],
    name: str,
    threads: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, int]]:
    """Write a folder as GGUF files, one an outtype; each tensor is read once, and held in memory alone.

    targets: outtype -> file, which appears by rename when all are whole. vocabulary puts the tokenizer's keys on a
    gguf.GGUFWriter. name: general.name. threads: for quantising, 0 as many as this process may use. The same folder gives the
    same bytes. Returns, for each outtype, how many tensors have which type.

    ValueError where the folder, an outtype or the disk does not allow it; nothing is left half-written.
    """
    import gguf

    config = read_config(folder)
    unknown = [outtype for outtype in targets if outtype not in OUTTYPES]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no outtype; there are {', '.join(OUTTYPES)}")
    tensors = plan(folder, config)
    types = {
        out: [tensor_type(out, t.name, t.stored.shape, config) for t in tensors] for out in targets
    }
    rows = (
        k_rows() if any(kind.endswith("_K") for kinds in types.values() for kind in kinds) else None
    )
    for path in targets.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    check_space(tensors, types, targets)
    threads = threads or len(os.sched_getaffinity(0))
    with _temporary(targets) as parts, ThreadPoolExecutor(threads) as pool:
        writers = {}
        for outtype, part in parts.items():
            writer = writers[outtype] = gguf.GGUFWriter(None, architecture(config))
            _describe(writer, config, name, outtype)
            vocabulary(writer)
            for tensor, kind in zip(tensors, types[outtype], strict=True):
                _announce(writer, tensor, gguf.GGMLQuantizationType[kind])
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        try:
            for i, tensor in enumerate(tensors):
                values = tensor.stored.read()
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"{folder}: {tensor.name} holds values that are not finite; take an earlier checkpoint"
                    )
                values = permute(values, tensor.heads) if tensor.heads else values
                done: dict[str, np.ndarray] = {}
                for outtype, writer in writers.items():
                    kind = types[outtype][i]
                    if kind not in done:
                        done[kind] = quantise(values, kind, tensor.name, pool, rows)
                    writer.write_tensor_data(done[kind])
                if i % 50 == 49:
                    say(f"{i + 1} of {len(tensors)} tensors")
        finally:
            for writer in writers.values():
                writer.close()
    return {
        out: {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        for out, kinds in types.items()
    }


def _describe(writer: Any, config: ModelConfig, name: str, outtype: str) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[OUTTYPES[outtype]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    if isinstance(config, MoeConfig):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.resolved_head_dim)
    writer.add_value_length(config.resolved_head_dim)
    writer.add_rope_dimension_count(config.resolved_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _announce(writer: Any, tensor: Planned, kind: Any) -> None:
    import gguf

    shape = gguf.quant_shape_to_byte_shape(tensor.stored.shape, kind)
    if kind.name in ("F32", "F16", "BF16"):
        size = int(np.prod(tensor.stored.shape)) * (4 if kind.name == "F32" else 2)
        writer.add_tensor_info(
            tensor.name, tensor.stored.shape, np.dtype(np.float32), size, raw_dtype=kind
        )
    else:
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind
        )


def quantise(
    values: np.ndarray, kind: str, name: str, pool: ThreadPoolExecutor, rows: Quantise | None
) -> np.ndarray:
    """fp32 values as they lie in a file: rows [n, bytes] of a quantised type, else of the type itself."""
    import gguf

    if kind == "F32":
        return values
    if kind == "F16":
        if float(np.abs(values).max(initial=0)) > 65_504:
            raise ValueError(
                f"{name} holds values beyond the range of f16; export bf16 or f32 instead"
            )
        return values.astype(np.float16)
    qtype = gguf.GGMLQuantizationType[kind]

    def part(slab: np.ndarray) -> np.ndarray:
        if kind.endswith("_K"):
            assert rows is not None
            return rows(slab, int(qtype))
        return gguf.quants.quantize(slab, qtype)

    values = values.reshape(-1, values.shape[-1])
    count = max(1, SLAB // values.shape[-1])
    slabs = [values[i : i + count] for i in range(0, len(values), count)]
    return np.concatenate(list(pool.map(part, slabs)))


def k_rows() -> Quantise:
    """What quantises rows to Q4_K and Q6_K: a llama.cpp library, or libgguf (the same bytes; its threads wait for each other)."""
    from inference.llamacpp import library, quantise_rows

    try:
        library()
        return quantise_rows
    except ValueError:
        pass
    try:
        import libgguf
    except ImportError:
        raise ValueError(
            "q4_k_m needs libgguf or a llama.cpp; pip install libgguf==0.2.2, or xllamacpp"
        ) from None
    return lambda values, kind: np.asarray(libgguf.quantize_rows(values, kind)).reshape(
        len(values), -1
    )


def check_space(
    tensors: list[Planned], types: dict[str, list[str]], targets: Mapping[str, Path]
) -> None:
    """ValueError where the files of a folder need more than its disk has left; 16 MB a file are for the vocabulary."""
    import gguf

    need: dict[Path, int] = {}
    for outtype, kinds in types.items():
        shapes = (
            (t.stored.shape, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[k]])
            for t, k in zip(tensors, kinds, strict=True)
        )
        size = (
            sum(int(np.prod(shape)) // block * width for shape, (block, width) in shapes)
            + 16_000_000
        )
        folder = targets[outtype].parent
        need[folder] = need.get(folder, 0) + size
    for folder, size in need.items():
        free = shutil.disk_usage(folder).free
        if free < size:
            raise ValueError(
                f"{folder} has {free / 1e9:.2f} GB left, but the files take {size / 1e9:.2f} GB; make room there"
            )


@contextmanager
def _temporary(targets: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Files to write, which take their names when all went well, and are gone when not."""
    for folder in {path.parent for path in targets.values()}:
        sweep(folder)
    parts = {outtype: temporary(path) for outtype, path in targets.items()}
    try:
        yield parts
        for outtype, part in parts.items():
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(targets[outtype])
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)

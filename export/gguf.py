"""Write a checkpoint as GGUF files, tensor by tensor, for llama.cpp.

Tensor types and fallbacks follow llama.cpp's quantiser (llama-quant.cpp). Weights are
quantised from the stored values, never from f16. Needs the gguf package; q4_k_m also needs a
llama.cpp library (inference/llamacpp.py) or libgguf.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from export.gguf_plan import PlannedTensor, architecture, permute, plan_tensors, read_config
from files import remove_stale, temporary
from machine import cpus
from models.nanollama import ModelConfig
from models.rope import RopeScaling

OUTTYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_k_m": "MOSTLY_Q4_K_M",
}
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # row length not a multiple of 256
EIGHT_EXPERTS = {"attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q5_K"}  # exception of q4_k_m
SLAB = 2**20  # weights per quantisation task
# fp32 [rows, width], ggml type number -> uint8 [rows, bytes]
RowQuantiser = Callable[[np.ndarray, int], np.ndarray]


def tensor_type(outtype: str, name: str, shape: tuple[int, ...], config: ModelConfig) -> str:
    """Return the ggml type of a tensor in a file of this outtype, as llama.cpp chooses it."""
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
            outer = layer < layers // 8 or layer >= 7 * layers // 8
            kind = "Q6_K" if outer or (layer - layers // 8) % 3 == 2 else "Q4_K"
        if config.kind == "moe" and config.moe.experts == 8:
            kind = EIGHT_EXPERTS.get(name.split(".")[-2], kind)
        kind = FALLBACK.get(kind, kind) if shape[-1] % 256 else kind
    return "F16" if shape[-1] % 32 else kind


def write_gguf(
    folder: Path,
    targets: Mapping[str, Path],
    vocabulary: Callable[[Any], None],
    name: str,
    threads: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, int]]:
    """Write a folder as GGUF files, one per outtype. Each tensor is read once, one at a time.

    targets: outtype -> file; all files are renamed into place at the end. vocabulary adds the
    tokenizer's keys to a gguf.GGUFWriter. name: general.name. threads: for quantisation; 0: all
    cores of this process. Output bytes are deterministic. Returns outtype -> tensor type -> number
    of tensors.

    ValueError for an unsuitable folder, an unknown outtype or a full disk; no partial file remains.
    """
    import gguf

    config = read_config(folder)
    unknown = [outtype for outtype in targets if outtype not in OUTTYPES]
    if unknown:
        raise ValueError(f"unknown outtype {unknown[0]!r}; available: {', '.join(OUTTYPES)}")
    tensors = plan_tensors(folder, config)
    types = {
        out: [tensor_type(out, t.name, t.stored.shape, config) for t in tensors] for out in targets
    }
    has_k_quants = any(kind.endswith("_K") for kinds in types.values() for kind in kinds)
    quantise_rows = find_k_quantizer() if has_k_quants else None
    for path in targets.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    check_space(tensors, types, targets)
    threads = threads or cpus()
    with _published_by_rename(targets) as scratch, ThreadPoolExecutor(threads) as pool:
        writers = {}
        for outtype, path in scratch.items():
            writer = writers[outtype] = gguf.GGUFWriter(None, architecture(config))
            _add_model_keys(writer, config, name, outtype)
            vocabulary(writer)
            for tensor, kind in zip(tensors, types[outtype], strict=True):
                _add_tensor_info(writer, tensor, gguf.GGMLQuantizationType[kind])
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        try:
            for i, tensor in enumerate(tensors):
                values = tensor.stored.read()
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"{folder}: {tensor.name} has values that are not finite; "
                        "use an earlier checkpoint"
                    )
                values = permute(values, tensor.heads) if tensor.heads else values
                encoded: dict[str, np.ndarray] = {}  # by tensor type
                for outtype, writer in writers.items():
                    kind = types[outtype][i]
                    if kind not in encoded:
                        encoded[kind] = quantise(values, kind, tensor.name, pool, quantise_rows)
                    writer.write_tensor_data(encoded[kind])
                if i % 50 == 49:
                    say(f"{i + 1} of {len(tensors)} tensors")
        finally:
            for writer in writers.values():
                writer.close()
    return {
        out: {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        for out, kinds in types.items()
    }


def _add_model_keys(writer: Any, config: ModelConfig, name: str, outtype: str) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[OUTTYPES[outtype]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    feed_forward = config.intermediate_size
    if config.kind == "moe":
        writer.add_expert_count(config.moe.experts)
        writer.add_expert_used_count(config.moe.top_k)
        if architecture(config) == "qwen3moe":
            writer.add_expert_feed_forward_length(config.expert_size)
        else:
            feed_forward = config.expert_size
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.resolved_head_dim)
    writer.add_value_length(config.resolved_head_dim)
    writer.add_rope_dimension_count(config.resolved_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        _add_scaling_keys(writer, config.rope_scaling)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_scaling_keys(writer: Any, scaling: RopeScaling) -> None:
    import gguf

    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    if scaling.attention_factor is not None:  # llama.cpp multiplies this with the default factor
        ratio = scaling.attention_factor / scaling.default_attention_factor
        writer.add_rope_scaling_attn_factors(ratio)


def _add_tensor_info(writer: Any, tensor: PlannedTensor, kind: Any) -> None:
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
    values: np.ndarray,
    kind: str,
    name: str,
    pool: ThreadPoolExecutor,
    quantise_rows: RowQuantiser | None,
) -> np.ndarray:
    """Convert fp32 values to a type's file layout: uint8 [rows, bytes] for quantised types."""
    import gguf

    if kind == "F32":
        return values
    if kind == "F16":
        if float(np.abs(values).max(initial=0)) > 65_504:
            raise ValueError(
                f"{name} has values beyond the range of f16; export bf16 or f32 instead"
            )
        return values.astype(np.float16)
    qtype = gguf.GGMLQuantizationType[kind]

    def quantise_slab(slab: np.ndarray) -> np.ndarray:
        if kind.endswith("_K"):
            assert quantise_rows is not None
            return quantise_rows(slab, int(qtype))
        return gguf.quants.quantize(slab, qtype)

    values = values.reshape(-1, values.shape[-1])
    count = max(1, SLAB // values.shape[-1])
    slabs = [values[i : i + count] for i in range(0, len(values), count)]
    return np.concatenate(list(pool.map(quantise_slab, slabs)))


def find_k_quantizer() -> RowQuantiser:
    """Find a quantiser for Q4_K and Q6_K: llama.cpp, else libgguf (same bytes, one thread)."""
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
            "q4_k_m needs libgguf or llama.cpp; pip install libgguf==0.2.2, or xllamacpp"
        ) from None

    def quantise_with_libgguf(values: np.ndarray, kind: int) -> np.ndarray:
        return np.asarray(libgguf.quantize_rows(values, kind)).reshape(len(values), -1)

    return quantise_with_libgguf


def check_space(
    tensors: list[PlannedTensor], types: dict[str, list[str]], targets: Mapping[str, Path]
) -> None:
    """ValueError if a disk is too small for its files; each includes 16 MB for the vocabulary."""
    import gguf

    need: dict[Path, int] = {}
    for outtype, kinds in types.items():
        size = 16_000_000
        for tensor, kind in zip(tensors, kinds, strict=True):
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            size += int(np.prod(tensor.stored.shape)) // block * block_bytes
        folder = targets[outtype].parent
        need[folder] = need.get(folder, 0) + size
    for folder, size in need.items():
        free = shutil.disk_usage(folder).free
        if free < size:
            raise ValueError(
                f"{folder} has {free / 1e9:.2f} GB free, but the files need {size / 1e9:.2f} GB; "
                "free some space"
            )


@contextmanager
def _published_by_rename(targets: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Yield temporary files; rename them to their targets on success, remove them on failure."""
    for folder in {path.parent for path in targets.values()}:
        remove_stale(folder)
    scratch = {outtype: temporary(path) for outtype, path in targets.items()}
    try:
        yield scratch
        for outtype, path in scratch.items():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(targets[outtype])
    finally:
        for path in scratch.values():
            path.unlink(missing_ok=True)

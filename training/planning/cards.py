"""Facts about GPUs, and published training throughputs. Each number has its source.

All cards are Ampere or newer: they multiply bf16 natively.
"""

import re
from typing import Any, NamedTuple

from training.meter import PEAK_FLOPS

GIB = 2**30


class Gpu(NamedTuple):
    """Memory and peak speeds of a GPU. Speeds are the vendor's; real programs are slower."""

    memory: float  # bytes that CUDA reports to torch
    flops: float  # dense bf16 matmuls with fp32 accumulation, per second, without sparsity
    bandwidth: float  # bytes per second of its memory
    link: float  # bytes per second to the other GPUs, in one direction
    over: str  # the link: NVLink or PCIe
    capability: float  # CUDA compute capability; float8 matmuls need 8.9
    title: str
    source: str  # of flops, bandwidth and link


# Memory: "total capacity" in torch's out-of-memory messages in public issues, in GiB (B200:
# pytorch/ao pull request 4002; RTX 5090: TrajectoryCrafter issue 20; RTX 3090: GaoLii/DSP issue 10;
# RTX 4060: EdgeRegNet issue 2). Compute capability: developer.nvidia.com/cuda-gpus.
# Vendors add both directions of a link; `link` is half of their figure. The GeForce and L4 cards
# exchange data over PCIe. The RTX 4090 and 5090 copy through host memory, which is slower.
GPUS = {
    "h100": Gpu(
        *(79.1 * GIB, PEAK_FLOPS["H100"], 3.35e12, 450e9, "NVLink", 9.0),
        "H100 SXM 80 GB",
        "vendor datasheet: NVIDIA H100 Tensor Core GPU (SXM)",
    ),
    "h200": Gpu(
        *(139.8 * GIB, PEAK_FLOPS["H200"], 4.8e12, 450e9, "NVLink", 9.0),
        "H200 SXM 141 GB",
        "vendor datasheet: NVIDIA H200 Tensor Core GPU (SXM)",
    ),
    "b200": Gpu(
        *(178.3 * GIB, PEAK_FLOPS["B200"], 8.0e12, 900e9, "NVLink", 10.0),
        "B200 180 GB",
        "vendor datasheet: NVIDIA HGX B200; peak is half of the figure with sparsity",
    ),
    "a100-80": Gpu(
        *(79.1 * GIB, PEAK_FLOPS["A100"], 2.039e12, 300e9, "NVLink", 8.0),
        "A100 SXM 80 GB",
        "vendor datasheet: NVIDIA A100 Tensor Core GPU (SXM)",
    ),
    "a100-40": Gpu(
        *(39.4 * GIB, PEAK_FLOPS["A100"], 1.555e12, 300e9, "NVLink", 8.0),
        "A100 SXM 40 GB",
        "vendor datasheet: NVIDIA A100 Tensor Core GPU (SXM, 40 GB)",
    ),
    "l40s": Gpu(
        *(44.4 * GIB, 362.05e12, 864e9, 32e9, "PCIe", 8.9),
        "L40S 48 GB",
        "vendor datasheet: NVIDIA L40S; PCIe 4.0 x16",
    ),
    "l4": Gpu(
        *(22.0 * GIB, 121e12, 300e9, 32e9, "PCIe", 8.9),
        "L4 24 GB",
        "vendor datasheet: NVIDIA L4; peak is half of the figure with sparsity; PCIe 4.0 x16",
    ),
    "rtx5090": Gpu(
        *(31.36 * GIB, 209.5e12, 1.792e12, 64e9, "PCIe", 12.0),
        "GeForce RTX 5090 32 GB",
        "vendor datasheet: NVIDIA RTX Blackwell GPU architecture whitepaper; PCIe 5.0 x16",
    ),
    "rtx4090": Gpu(
        *(23.6 * GIB, 165.2e12, 1.008e12, 32e9, "PCIe", 8.9),
        "GeForce RTX 4090 24 GB",
        "vendor datasheet: NVIDIA Ada GPU architecture whitepaper; PCIe 4.0 x16",
    ),
    "rtx3090": Gpu(
        *(23.7 * GIB, 71e12, 936e9, 32e9, "PCIe", 8.6),
        "GeForce RTX 3090 24 GB",
        "vendor datasheet: NVIDIA Ampere GA102 GPU architecture whitepaper; PCIe 4.0 x16",
    ),
    "rtx3060": Gpu(
        *(11.76 * GIB, 25.5e12, 360e9, 32e9, "PCIe", 8.6),
        "GeForce RTX 3060 12 GB",
        "vendor datasheet: NVIDIA GeForce RTX 3060; peak from 112 tensor cores x 128 FLOPs x "
        "1.777 GHz as in the GA102 whitepaper; PCIe 4.0 x16",
    ),
    "laptop8": Gpu(
        *(7.75 * GIB, 29.1e12, 256e9, 16e9, "PCIe", 8.9),
        "GeForce RTX 4060 Laptop 8 GB",
        "vendor datasheet: NVIDIA GeForce RTX 4060 Laptop GPU; peak from 96 tensor cores x 128 "
        "FLOPs x 2.37 GHz as in the Ada whitepaper (at 115 W); PCIe 4.0 x8",
    ),
}
# Other cards whose names are one character from those in GPUS: their names are not typing errors.
OTHERS = ("gb200", "h20", "l40", "rtx4090d", "rtx5090d")


def check_gpu(name: str, more: str = "") -> None:
    """ValueError for a GPU that is not in GPUS. more: text after the names of GPUS."""
    if name not in GPUS:
        close = [f"did you mean {gpu}? " for gpu in GPUS if _is_slip(name, gpu)]
        raise ValueError(
            f"unknown --gpu {name}; {close[0] if close else ''}available: {', '.join(GPUS)}{more}. "
            "For another card, give one of these that has no more memory and is no faster"
        )


def _is_slip(typed: str, gpu: str) -> bool:
    """Whether `typed` lacks rtx, or has one character too many, one too few or two swapped.

    Another character in place of one is another card: V100, RTX 4080.
    """
    word, known = (re.sub(r"[^a-z0-9]|nvidia|geforce", "", text.lower()) for text in (typed, gpu))
    if word in OTHERS:
        return False
    shorter, longer = sorted((word, known), key=len)
    if len(shorter) == len(longer):
        swaps = [word[:i] + word[i : i + 2][::-1] + word[i + 2 :] for i in range(len(word))]
        return known in (word, *swaps)
    dropped = [longer[:i] + longer[i + 1 :] for i in range(len(longer))]
    return shorter in dropped or known.removeprefix("rtx") == word


class Published(NamedTuple):
    """A published training throughput, and the shape to compute its bound from."""

    name: str
    gpu: str  # one of GPUS
    gpus: int
    tokens_per_s: float  # per GPU
    sequence_length: int
    rows: int  # per micro-batch; assumed where the source does not give it
    tokens_per_step: int  # over all GPUs; assumed where the source does not give it
    model: dict[str, Any]  # fields of ModelConfig
    source: str


TINYLLAMA: dict[str, Any] = {}  # the defaults of ModelConfig
# Two matrices of 4 x width become three of 8/3 x width, with equal FLOPs.
MPT_1B = {"vocab_size": 50_368, "hidden_size": 2048, "intermediate_size": 5461}
MPT_1B |= {"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16}
MPT_1B |= {"tie_word_embeddings": True}
OLMO_1B = {"vocab_size": 100_352, "hidden_size": 2048, "intermediate_size": 5632}
OLMO_1B |= {"num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 16}
LLAMA_1B = {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192}
LLAMA_1B |= {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_1B |= {"tie_word_embeddings": True}
NANOCHAT_D26 = {"vocab_size": 32_768, "hidden_size": 1664, "intermediate_size": 4437}
NANOCHAT_D26 |= {"num_hidden_layers": 26, "num_attention_heads": 13, "num_key_value_heads": 13}

MOSAIC = "MosaicML llm-foundry, scripts/train/benchmarking/README.md"
OLMO_CORE = "OLMo-core README, commit"
PUBLISHED = (
    Published(
        *("TinyLlama 1.1B", "a100-40", 16, 24_000, 2048, 8, 2**21, TINYLLAMA), "TinyLlama README"
    ),
    Published("MosaicML 1.3B", "h100", 8, 45_455, 2048, 16, 2**20, MPT_1B, MOSAIC),
    Published("MosaicML 1.3B", "h100", 8, 38_535, 4096, 8, 2**20, MPT_1B, MOSAIC),
    Published("MosaicML 1.3B", "h100", 8, 29_157, 8192, 4, 2**20, MPT_1B, MOSAIC),
    Published("MosaicML 1.3B", "h100", 8, 19_649, 16_384, 2, 2**20, MPT_1B, MOSAIC),
    Published("MosaicML 1.3B", "a100-80", 8, 20_513, 2048, 16, 2**20, MPT_1B, MOSAIC),
    Published("MosaicML 1.3B", "a100-80", 8, 17_807, 4096, 8, 2**20, MPT_1B, MOSAIC),
    Published("MosaicML 1.3B", "a100-80", 8, 13_814, 8192, 4, 2**20, MPT_1B, MOSAIC),
    Published(
        *("OLMo-core 1B, September 2024", "h100", 8, 44_000, 4096, 8, 2**21, OLMO_1B),
        f"{OLMO_CORE} f32d0bf",
    ),
    Published(
        *("OLMo-core 1B, November 2024", "h100", 8, 55_000, 4096, 8, 2**21, OLMO_1B),
        f"{OLMO_CORE} e27ba74",
    ),
    Published(
        *("nanotron 1B, not compiled", "h100", 8, 42_000, 4096, 2, 2**20, LLAMA_1B),
        "Hugging Face training playbook, in marin issue 1826",
    ),
    Published(
        *("nanochat d26", "h100", 8, 78_800, 2048, 16, 2**20, NANOCHAT_D26),
        "nanochat dev/LOG.md; its attention windows are shorter than its rows",
    ),
)

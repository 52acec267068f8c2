"""Scaling of rotary positions to a longer context, by YaRN or as in Llama 3, and its JSON keys."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from ranges import PositiveFloat, at_least, check_fields, one_of

YARN_KEYS = ("beta_fast", "beta_slow", "attention_factor")
LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor")
KEYS = ("factor", "original_max_position_embeddings", *YARN_KEYS, *LLAMA3_KEYS)
TYPES = ("yarn", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (arXiv:2309.00071) or Llama 3's scaling, with the names and values of transformers.

    Channels that turn at least beta_fast times in the original context keep their frequency. Those
    that turn at most beta_slow times are slowed down by `factor`. Between them, a linear ramp
    blends both. The result depends on the settings alone, not on the length of a row. In Llama 3,
    the bounds are high_freq_factor and low_freq_factor, and the ramp is linear in the turns.
    """

    type: Annotated[str, one_of(*TYPES)]  # kind of scaling
    factor: Annotated[float, at_least(1, maximum=1e6)]  # longest context / original context
    # Longest context before scaling.
    original_max_position_embeddings: Annotated[int, at_least(1, below=2**31)]
    beta_fast: PositiveFloat = 32.0  # yarn: channels with at least this many turns are unchanged
    beta_slow: PositiveFloat = 1.0  # yarn: channels with at most this many turns are slowed
    # yarn: factor of the rotated queries and keys. Default: 0.1 ln(factor) + 1.
    attention_factor: PositiveFloat | None = None
    # llama3, required: a channel with at most this many turns is slowed by factor.
    low_freq_factor: PositiveFloat | None = None
    # llama3, required: a channel with at least this many turns is unchanged.
    high_freq_factor: PositiveFloat | None = None

    def __post_init__(self) -> None:
        check_fields(self, "model.rope_scaling")
        unused = YARN_KEYS if self.type == "llama3" else LLAMA3_KEYS
        for name in unused:
            if (value := getattr(self, name)) != self.__dataclass_fields__[name].default:
                raise ValueError(
                    f"model.rope_scaling.{name}={value:g} has no effect with type={self.type}; "
                    "remove it"
                )
        if self.type == "llama3":
            if not (self.low_freq_factor or 0) < (self.high_freq_factor or 0):
                raise ValueError(
                    "model.rope_scaling of type llama3 needs low_freq_factor and a larger "
                    "high_freq_factor; set both"
                )
            return
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"model.rope_scaling.beta_fast={self.beta_fast:g} must be above "
                f"model.rope_scaling.beta_slow={self.beta_slow:g}"
            )

    def __str__(self) -> str:
        title = "YaRN" if self.type == "yarn" else "Llama 3"
        original = f"{self.original_max_position_embeddings:,} tokens"
        words = [f"{title} factor {self.factor:g} of {original}"]
        for name in (*YARN_KEYS, *LLAMA3_KEYS):
            if (value := getattr(self, name)) != self.__dataclass_fields__[name].default:
                words.append(f"{name} {value:g}")
        return ", ".join(words)

    @property
    def has_other_betas(self) -> bool:
        """Whether beta_fast or beta_slow differs from the paper's value."""
        return (self.beta_fast, self.beta_slow) != (32.0, 1.0)

    @property
    def default_attention_factor(self) -> float:
        """The paper's factor (section 3.4): the attention scores grow by its square."""
        return 0.1 * math.log(self.factor) + 1

    @property
    def rotation_scale(self) -> float:
        """attention_factor, or its default; 1 in Llama 3."""
        if self.type == "llama3":
            return 1.0
        return self.attention_factor or self.default_attention_factor

    def check(self, head_dim: int, theta: float) -> None:
        """ValueError if YaRN's settings leave no channel to scale."""
        if self.type == "yarn":
            self.ramp(head_dim, theta)

    def ramp(self, head_dim: int, theta: float) -> tuple[int, int]:
        """Return the channels where YaRN's ramp begins and ends.

        ValueError if the settings leave no channel to scale.
        """

        def channel(turns: float) -> float:
            """The channel that turns this often in the original context."""
            positions = self.original_max_position_embeddings / (2 * math.pi * turns)
            return head_dim * math.log(positions) / (2 * math.log(theta))

        begin, end = 0, -1
        if theta > 1:
            begin = max(0, math.floor(channel(self.beta_fast)))
            end = min(head_dim - 1, math.ceil(channel(self.beta_slow)))
        if begin > end:
            raise ValueError(
                f"model.rope_scaling does not fit rope_theta={theta:g}: no channel turns between "
                f"{self.beta_slow:g} and {self.beta_fast:g} times in "
                f"{self.original_max_position_embeddings} tokens; correct these settings"
            )
        return begin, end

    def frequencies(self, head_dim: int, theta: float) -> Tensor:
        """Return radians per position, fp32 [head_dim / 2]."""
        if self.type == "llama3":
            return self._llama3_frequencies(head_dim, theta)
        begin, end = self.ramp(head_dim, theta)
        wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        channels = torch.arange(head_dim // 2, dtype=torch.float32)
        blend = 1 - ((channels - begin) / max(end - begin, 0.001)).clamp(0, 1)  # 1: unchanged
        return (1 - blend) / (self.factor * wavelengths) + blend / wavelengths

    def _llama3_frequencies(self, head_dim: int, theta: float) -> Tensor:
        assert self.low_freq_factor and self.high_freq_factor
        channels = torch.arange(0, head_dim, 2, dtype=torch.float32)
        frequencies = 1.0 / (theta ** (channels / head_dim))
        turns = self.original_max_position_embeddings / (2 * math.pi / frequencies)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0, 1)  # 1: unchanged
        return (1 - blend) * frequencies / self.factor + blend * frequencies

    def to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json's rope_parameters, or of rope_scaling (transformers 4)."""
        unused = YARN_KEYS if self.type == "llama3" else LLAMA3_KEYS
        values = {name: getattr(self, name) for name in KEYS if name not in unused}
        return {
            "rope_type": self.type,
            **{name: value for name, value in values.items() if value is not None},
        }


def rope_section(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the section of config.json with rotary settings that transformers 5 would use.

    ValueError if a section is not an object.
    """
    sections = [hf.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(section, dict) for section in sections):
        raise ValueError("rope_scaling and rope_parameters of config.json must be objects")
    return sections[0] or sections[1]


def rope_type(section: dict[str, Any]) -> Any:
    """Return the type of a section of config.json, which older folders call `type`."""
    return section.get("rope_type", section.get("type", "default"))


def unsupported_rope(section: dict[str, Any]) -> dict[str, bool]:
    """Map keys of a section of config.json to True if NanoLlama does not support their value."""
    kind = rope_type(section)
    return {
        "rope_type": kind not in ("default", *TYPES),
        "partial_rotary_factor": section.get("partial_rotary_factor", 1) != 1,
        "truncate": kind == "yarn" and section.get("truncate", True) is not True,
        "mscale": kind == "yarn" and bool(section.get("mscale") and section.get("mscale_all_dim")),
    }


def scaling_from_hf(hf: dict[str, Any], context: int) -> RopeScaling | None:
    """Convert config.json's rope scaling; None if it has none.

    context: max_position_embeddings, transformers' default for the original context. ValueError for
    a missing factor or a wrong value.
    """
    section = rope_section(hf)
    if rope_type(section) == "default":
        return None
    values = {name: section[name] for name in KEYS if section.get(name) is not None}
    original = "original_max_position_embeddings"
    # Phi-3 stores it outside the section.
    values[original] = hf.get(original) or values.get(original, context)
    if "factor" not in values:
        title = "YaRN" if rope_type(section) == "yarn" else "Llama 3"
        raise ValueError(f"rope_parameters of config.json must have a factor for {title}; add it")
    return RopeScaling(rope_type(section), **values)

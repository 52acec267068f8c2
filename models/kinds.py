"""The kinds of models that training builds: their configs and networks."""

from models.nanollama import ModelConfig, NanoLlama
from models.speedrun_config import GPTConfig
from models.speedrun_gpt import SpeedrunGPT

AnyConfig = ModelConfig | GPTConfig
AnyModel = NanoLlama | SpeedrunGPT


def build_model(config: AnyConfig, seed: int | None = None) -> AnyModel:
    """Build the network of a config. Without a seed, its weights stay uninitialized."""
    if isinstance(config, GPTConfig):
        return SpeedrunGPT(config, seed)
    return NanoLlama(config, seed)


def parameters_text(config: AnyConfig) -> str:
    """Return the number of parameters as text; for a mixture of experts, also the active number."""
    active = f" ({config.num_active_parameters:,} active)" if config.kind == "moe" else ""
    return f"{config.num_parameters:,} parameters{active}"

"""The kinds of models that training builds: their configs and networks."""

from models.nanollama import ModelConfig, NanoLlama
from models.speedrun_gpt import GPTConfig, SpeedrunGPT

AnyConfig = ModelConfig | GPTConfig
AnyModel = NanoLlama | SpeedrunGPT


def build_model(config: AnyConfig, seed: int | None = None) -> AnyModel:
    """Build the network of a config. Without a seed, a checkpoint must fill its weights."""
    if isinstance(config, GPTConfig):
        return SpeedrunGPT(config, seed)
    return NanoLlama(config, seed)

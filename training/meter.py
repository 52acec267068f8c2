"""Step metrics: tokens/s, share of time waiting for data, MFU, GPU utilization and memory."""

import resource
import sys
import time

import torch
import torch.distributed as dist

from machine import gpu_utilization
from models.kinds import AnyConfig
from models.speedrun_config import GPTConfig
from training.config import RunConfig
from training.ops.watchdog import COMPUTES, READS, HangWatchdog

PEAK_FLOPS = {  # dense bf16 FLOP/s per GPU; the first name that the device's name contains applies
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}


def flops_per_token(config: AnyConfig, length: int) -> float:
    """Return training FLOPs per token, by the PaLM convention.

    6 per matmul parameter that a token uses (of its top_k experts only), and 12 * layers * width *
    length for attention, not halved for the mask.
    """
    if isinstance(config, GPTConfig):
        return config.flops_per_token(length)
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    matmul = config.num_active_parameters - embedding
    norms = config.hidden_size * (2 * config.num_hidden_layers + 1)
    qk_norms = 2 * config.resolved_head_dim * config.num_hidden_layers if config.qk_norm else 0
    width = config.num_attention_heads * config.resolved_head_dim
    return 6 * (matmul - norms - qk_norms) + 12 * config.num_hidden_layers * width * length


class Meter:
    """Times training steps, including the wait for data but not validation or saving.

    every: steps between samples of GPU utilization.
    """

    def __init__(
        self, config: AnyConfig, length: int, world: int, device: torch.device, every: int = 1
    ):
        self.flops, self.world, self.device = flops_per_token(config, length), world, device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)
        self.began = self.waited = 0.0
        self.steps, self.every, self.samples = 0, every, device.type == "cuda"

    def start(self) -> None:
        self.began = time.perf_counter()

    def data_ready(self) -> None:
        self.waited = time.perf_counter() - self.began

    def stop(self, tokens: int) -> dict[str, float]:
        """Return the metrics of the step, once its loss has been read. tokens: of all ranks.

        An optimizer step still in the GPU's queue counts toward the next step; means are exact.
        """
        seconds = time.perf_counter() - self.began
        metrics = {
            "tokens_per_s": tokens / seconds,
            "step_s": seconds,
            "data/wait_frac": self.waited / seconds,
        }
        if self.peak:
            metrics["mfu"] = tokens / seconds / self.world * self.flops / self.peak
        if self.device.type == "cuda":
            metrics["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            metrics |= self._gpu_utilization()
        elif self.device.type == "mps":
            metrics["memory_gb"] = torch.mps.driver_allocated_memory() / 1e9
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            metrics["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        return metrics

    def _gpu_utilization(self) -> dict[str, float]:
        """Return GPU utilization; {} between samples, and after a failed sample."""
        self.steps += 1
        if not self.samples or self.steps % self.every:
            return {}
        share = gpu_utilization(self.device)
        self.samples = share is not None
        return {} if share is None else {"gpu_util": share}


class StepClock:
    """The clock of the training loop: times each step, and limits its duration.

    A step runs from begin() to metrics(): first its data, then its computation. The time limit
    (parallel.timeout_s) covers begin() to computed(). Neither covers validation, logging or saving.
    """

    def __init__(self, run: RunConfig, device: torch.device):
        self.meter = Meter(
            run.model, run.data.sequence_length, dist.get_world_size(), device, run.log.every
        )
        self.watch = HangWatchdog(run.parallel.timeout_s, run.logs / "hang")
        self.step = 0

    def __enter__(self) -> "StepClock":
        self.watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.watch.__exit__(*error)

    def begin(self, step: int) -> None:
        """Start step number `step`, counted from 1; this rank waits for data."""
        self.step = step
        self.meter.start()
        self.watch.begin(step, READS)

    def data_ready(self) -> None:
        """Record that the step's data have arrived; this rank computes."""
        self.watch.begin(self.step, COMPUTES)
        self.meter.data_ready()

    def computed(self) -> None:
        """End the time limit: all ranks have passed the step's reduction."""
        self.watch.pause()

    def metrics(self, tokens: int) -> dict[str, float]:
        """End the step and return the metrics of Meter.stop. tokens: of all ranks."""
        return self.meter.stop(tokens)

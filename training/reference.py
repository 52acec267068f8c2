"""Log-probabilities of answers under the DPO reference model, computed once and cached in a file.

The file's header records the inputs (weights, data, length, ...); a file with other inputs is
rejected. Only the pairs that a run reads are computed, in that run's batches: at the first step,
policy and reference agree bit for bit.
"""

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from files import check_free_space, disk_full_error, is_full, remove_stale, temporary
from models.hf import load_weights
from models.nanollama import ModelConfig, NanoLlama
from training.config import RunConfig
from training.distributed import run_on_rank0
from training.fsdp_utils import wrap_model_fsdp
from training.preference_losses import answer_logps

PairKey = tuple[str, int]  # source, pair index
Steps = Iterable[tuple[list[PairKey], Callable[[], Iterable[tuple[list[PairKey], Any]]]]]
SAVE_EVERY = 200  # batches


class ReferenceLogps:
    """Cached log-probabilities: "<split>/<source>" -> fp32 [pairs, 2], chosen and rejected.

    NaN marks pairs that are not computed yet.
    """

    def __init__(self, path: Path, inputs: dict[str, str], sizes: dict[str, int]):
        """Read the file if it exists; ValueError if it is damaged or has other inputs."""
        self.path, self.inputs = path, inputs
        cached = run_on_rank0(lambda: _read(path, inputs))
        self.values = {name: torch.full((size, 2), torch.nan) for name, size in sizes.items()}
        for name, values in cached.items():
            if name in sizes:
                self.values[name] = values

    def lookup(self, split: str, names: list[PairKey], batch: Any = None) -> Tensor:
        """Return log-probabilities [2n]: n chosen answers, then n rejected answers."""
        return torch.stack(
            [self.values[f"{split}/{name}"][index] for name, index in names]
        ).T.flatten()

    def compute(
        self,
        model: Callable[[], nn.Module],
        steps: dict[str, Steps],
        log: Callable[[str], None] = lambda _: None,
    ) -> int:
        """Compute and save the missing pairs of all steps; return their number. Collective.

        model: builds the reference model; called only if pairs are missing, freed at the end.
        steps: split -> for each step, its pairs over all ranks and a function that yields this
        rank's batches with their pairs.
        """
        computed, batches = 0, 0
        reference: nn.Module | None = None
        logps_by_key: dict[PairKey, Tensor] = {}
        scheduled: set[PairKey] = set()
        for split, step_pairs, make_batches in (
            (split, *step) for split, split_steps in steps.items() for step in split_steps
        ):
            keys = {name: (f"{split}/{name[0]}", name[1]) for name in step_pairs}
            missing = {
                (source, index)
                for source, index in keys.values()
                if (source, index) not in scheduled and self.values[source][index].isnan().any()
            }
            if not missing:
                continue
            scheduled |= missing
            reference = reference or model()
            device = next(reference.parameters()).device
            for names, batch in make_batches():
                logps = frozen_logps(reference, batch.to(device)).cpu().unflatten(0, (2, -1)).T
                logps_by_key |= {
                    keys[name]: logps[i] for i, name in enumerate(names) if keys[name] in missing
                }
                batches += 1
            if batches >= SAVE_EVERY:
                computed, batches = computed + self._save(logps_by_key), 0
                logps_by_key = {}
                log(f"reference: computed {computed:,} pairs")
        if reference is not None:
            computed += self._save(logps_by_key)
            log(f"reference: computed log-probabilities of {computed:,} pairs, saved {self.path}")
        del reference
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()
        return computed

    def _save(self, logps_by_key: dict[PairKey, Tensor]) -> int:
        """Gather the results of all ranks and write the file; return their number. Collective."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, logps_by_key)
        merged = {key: logps for results in reversed(gathered) for key, logps in results.items()}
        for (name, index), logps in merged.items():
            self.values[name][index] = logps
        run_on_rank0(lambda: _write(self.path, self.inputs, self.values))
        return len(merged)


def _write(path: Path, inputs: dict[str, str], values: dict[str, Tensor]) -> None:
    size = sum(tensor.nbytes for tensor in values.values())
    check_free_space(
        path.parent, size, "the file of reference log-probabilities (dpo.reference_cache)"
    )
    remove_stale(path.parent)
    folder = temporary(path)  # safetensors first writes a file with a random name
    try:
        folder.mkdir()
        header = {"made_of": json.dumps(inputs), "sha256": _sha256(values)}
        save_file(values, folder / path.name, header)
        (folder / path.name).rename(path)
    except (SafetensorError, OSError) as error:
        if not is_full(error):
            raise
        advice = f"{path} was not written; free some space there and run the same command again"
        raise disk_full_error(path.parent, error, advice) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path, inputs: dict[str, str]) -> dict[str, Tensor]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it as dpo.reference_cache")
    if not path.is_file():
        return {}
    advice = "remove it, or name another file as dpo.reference_cache"
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        cached_inputs, checksum = json.loads(header["made_of"]), header["sha256"]
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable file of reference log-probabilities; {advice}"
        ) from error
    changed = [key for key in inputs if cached_inputs.get(key) != inputs[key]]
    if changed:
        raise ValueError(
            f"{path} was computed with different inputs: {', '.join(changed)}; {advice}"
        )
    if checksum != _sha256(values):
        raise ValueError(f"{path} is damaged: its checksum does not match; {advice}")
    return values


def _sha256(values: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(f"{name} {tuple(values[name].shape)}".encode())
        digest.update(values[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def build_reference(
    folder: Path, config: ModelConfig, new_tokens: range | None = None
) -> NanoLlama:
    """Load a frozen model from a folder, in fp32 on the CPU.

    new_tokens: ids that the folder's tokenizer lacks.
    """
    model = NanoLlama(config)
    load_weights(model, folder, new_tokens)
    return model.requires_grad_(False).eval()


def sharded(model: NanoLlama, run: RunConfig, device: torch.device) -> nn.Module:
    """Shard a reference model like the policy, so that both compute bit-identical results."""
    model.attention, model.compile_head = run.parallel.attention, run.parallel.compile
    return wrap_model_fsdp(model, run.parallel, device)


def frozen_logps(model: nn.Module, batch: Any) -> Tensor:
    """Return the log-probabilities [2n] of a batch's answers, without gradients."""
    with torch.no_grad():
        return answer_logps(model, batch)

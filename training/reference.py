"""Log-probabilities of answers under the reference model: computed once and kept, or by a frozen model on the CPU.

The file of kept ones says in its header what they were made of; it is refused for anything else. Only the pairs that a run reads
are computed, in the batches in which it reads them, so the first step finds policy and reference equal to the last bit.
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

from files import check_room, is_full, no_room, sweep, temporary
from models.hf import load_weights
from models.nanollama import ModelConfig, NanoLlama
from training.config import RunConfig
from training.distributed import run_on_rank0
from training.fsdp_utils import wrap_model_fsdp
from training.preference_losses import answer_logps

Name = tuple[str, int]  # a source, and which of its pairs
Steps = Iterable[tuple[list[Name], Callable[[], Iterable[tuple[list[Name], Any]]]]]
SAVED_EVERY = 200  # batches


class ReferenceLogps:
    """fp32 [pairs, 2] by "<split>/<source>", chosen and rejected; NaN where not computed yet."""

    def __init__(self, path: Path, made_of: dict[str, str], sizes: dict[str, int]):
        """ValueError where the file exists and is of something else, or damaged."""
        self.path, self.made_of = path, made_of
        found = run_on_rank0(lambda: _read(path, made_of))
        self.values = {name: torch.full((size, 2), torch.nan) for name, size in sizes.items()}
        for name, values in found.items():
            if name in sizes:
                self.values[name] = values

    def of(self, split: str, names: list[Name], batch: Any = None) -> Tensor:
        """[2n]: of the n chosen, then of the n rejected."""
        return torch.stack(
            [self.values[f"{split}/{name}"][index] for name, index in names]
        ).T.flatten()

    def compute(
        self,
        model: Callable[[], nn.Module],
        steps: dict[str, Steps],
        say: Callable[[str], None] = lambda _: None,
    ) -> int:
        """Collective. Compute what is missing of the steps of each split and keep it; returns how many pairs that were.

        model: makes the reference model, where something is missing; it is given up after. steps: pairs of a step over all
        ranks, and what makes its batches on this rank, with their pairs.
        """
        done, batches = 0, 0
        made: nn.Module | None = None
        fresh: dict[Name, Tensor] = {}
        planned: set[Name] = set()
        for split, of_step, make in (
            (split, *step) for split, part in steps.items() for step in part
        ):
            key = {name: (f"{split}/{name[0]}", name[1]) for name in of_step}
            wanted = {
                at
                for at in key.values()
                if at not in planned and self.values[at[0]][at[1]].isnan().any()
            }
            if not wanted:
                continue
            planned |= wanted
            made = made or model()
            device = next(made.parameters()).device
            for names, batch in make():
                logps = frozen_logps(made, batch.to(device)).cpu().unflatten(0, (2, -1)).T
                fresh |= {
                    key[name]: logps[i] for i, name in enumerate(names) if key[name] in wanted
                }
                batches += 1
            if batches >= SAVED_EVERY:
                done, batches, fresh = done + self._keep(fresh), 0, {}
                say(f"reference: {done:,} pairs computed")
        if made is not None:
            done += self._keep(fresh)
            say(f"reference: log-probabilities of {done:,} pairs computed and kept in {self.path}")
        del made
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return done

    def _keep(self, fresh: dict[Name, Tensor]) -> int:
        """Collective. Take over what all ranks computed, and write the file."""
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, fresh)
        found = {name: value for share in reversed(shares) for name, value in share.items()}
        for (name, index), value in found.items():
            self.values[name][index] = value
        run_on_rank0(lambda: _write(self.path, self.made_of, self.values))
        return len(found)


def _write(path: Path, made_of: dict[str, str], values: dict[str, Tensor]) -> None:
    size = sum(tensor.nbytes for tensor in values.values())
    check_room(path.parent, size, "the file of reference log-probabilities (dpo.reference_cache)")
    sweep(path.parent)
    part = temporary(path)  # a folder: safetensors writes to a file with a random name first
    try:
        part.mkdir()
        save_file(
            values, part / path.name, {"made_of": json.dumps(made_of), "sha256": _sum(values)}
        )
        (part / path.name).rename(path)
    except (SafetensorError, OSError) as error:
        if not is_full(error):
            raise
        todo = f"{path} was not written; free some space there and run the same command again"
        raise no_room(path.parent, error, todo) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _read(path: Path, made_of: dict[str, str]) -> dict[str, Tensor]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it as dpo.reference_cache")
    if not path.is_file():
        return {}
    ways = "remove it, or name another file as dpo.reference_cache"
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        own, total = json.loads(header["made_of"]), header["sha256"]
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} holds no reference log-probabilities that can be read; {ways}"
        ) from error
    other = [key for key in made_of if own.get(key) != made_of[key]]
    if other:
        raise ValueError(
            f"{path} holds reference log-probabilities made with other {', '.join(other)}; {ways}"
        )
    if total != _sum(values):
        raise ValueError(f"{path} is damaged: its log-probabilities have changed; {ways}")
    return values


def _sum(values: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(f"{name} {tuple(values[name].shape)}".encode())
        digest.update(values[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def build_reference(
    folder: Path, config: ModelConfig, new_tokens: range | None = None
) -> NanoLlama:
    """The frozen model of a folder, fp32 on the CPU. new_tokens: ids that the folder's tokenizer lacks."""
    model = NanoLlama(config)
    load_weights(model, folder, new_tokens)
    return model.requires_grad_(False).eval()


def sharded(model: NanoLlama, run: RunConfig, device: torch.device) -> nn.Module:
    """A reference model as the policy is built, so that the two compute the same to the last bit."""
    model.attention, model.compile_head = run.parallel.attention, run.parallel.compile
    return wrap_model_fsdp(model, run.parallel, device)


def frozen_logps(model: nn.Module, batch: Any) -> Tensor:
    """Log-probabilities [2n] of a batch's answers, without gradients."""
    with torch.no_grad():
        return answer_logps(model, batch)

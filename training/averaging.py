"""Average the weights of checkpoints, tensor by tensor, into a new Hugging Face folder.

At a constant learning rate, the mean of the last checkpoints forecasts the result of a decay
(arXiv:2505.12082, arXiv:2507.17634). Averaging of weights along a run: arXiv:1803.05407.
"""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.manifest import file_hash
from data.tokenizers.folder import copy_files
from files import (
    check_free_space,
    read_object,
    step_folders,
    step_number,
    temporary,
    write_json,
)
from models.hf import check_model_folder, read_config, weight_files
from training.checkpoint_files import (
    MANIFEST,
    find_damage,
    hash_files,
    model_hash,
    read_manifest,
    step_of,
)

RECORD = "average.json"  # in the folder of an average: {"sources": [...]}


class Stored(NamedTuple):
    """A tensor in a folder, as the header of its safetensors file describes it."""

    file: Any  # the open safetensors file
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, such as BF16


def complete_steps(phase: Path, every: int = 1, until: int | None = None) -> list[Path]:
    """Return a phase's complete step folders up to `until`, at multiples of `every`."""
    if not phase.is_dir():
        raise ValueError(f"{phase} does not exist; give the folder of a phase, with its step_N")
    return [
        folder
        for folder in step_folders(phase)
        if _is_chosen(step_of(folder), every, until) and read_manifest(folder) is not None
    ]


def _is_chosen(step: int, every: int, until: int | None) -> bool:
    return step % every == 0 and (until is None or step <= until)


def last_checkpoints(
    phase: Path,
    last: int,
    every: int = 1,
    until: int | None = None,
    max_distance: int | None = None,
) -> list[Path]:
    """Return the `last` newest complete step folders of a phase, in order of their steps.

    every: use only multiples of this step. until: the largest step. max_distance: most steps
    between neighbours. ValueError if there are fewer, or if one between them was deleted.
    """
    folders = complete_steps(phase, every, until)
    if len(folders) < last:
        names = ", ".join(folder.name for folder in folders) or "none"
        limits = f" of every {every} steps" * (every > 1) + f" up to step {until}" * bool(until)
        raise ValueError(
            f"{phase} has {len(folders)} complete checkpoints{limits} ({names}), but {last} were "
            "asked for; average fewer, or train with a larger checkpoint.keep"
        )
    chosen = folders[-last:]
    for before, after in pairwise(chosen):
        if max_distance and step_of(after) - step_of(before) > max_distance:
            raise ValueError(f"the checkpoints between {before} and {after.name} were deleted")
    return chosen


def record_of(sources: Sequence[Path], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Describe an average: path, step, hash and weight of each source. Default: equal weights.

    ValueError if a source is not a complete model folder, is given twice, or lacks a weight.
    """
    if len(sources) < 2:
        raise ValueError(f"{len(sources)} checkpoint was given; an average needs at least two")
    weights = _weights(sources, weights)
    for source in sources:
        if source.suffix == ".tmp":
            raise ValueError(f"{source} is being written; wait until it has its final name")
        check_model_folder(source)
    resolved = [source.resolve() for source in sources]
    if twice := [str(path) for path in resolved if resolved.count(path) > 1]:
        raise ValueError(f"{twice[0]} is given twice; use --weights to count it more")
    return {
        "sources": [
            {
                "checkpoint": str(source),
                "step": step_number(source),
                "hash": model_hash(source),
                "weight": weight,
            }
            for source, weight in zip(sources, weights, strict=True)
        ]
    }


def _weights(sources: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    """Return one weight per source, equal by default. ValueError if the numbers differ."""
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if len(weights) != len(sources):
        raise ValueError(
            f"{len(weights)} weights for {len(sources)} checkpoints; give one for each"
        )
    return weights


def _recorded(folder: Path) -> list[dict[str, Any]]:
    """Return the sources in an average's record; [] if it has none or the record is damaged."""
    sources = (read_object(folder / RECORD) or {}).get("sources")
    if not isinstance(sources, list):
        return []
    keys = {"checkpoint", "step", "hash", "weight"}
    complete = all(
        isinstance(source, dict)
        and keys <= source.keys()
        and isinstance(source["weight"], int | float)
        for source in sources
    )
    return sources if complete else []


def sources_of(folder: Path) -> list[Path]:
    """Return the checkpoints of an average; [] if the folder is not an average."""
    return [Path(source["checkpoint"]) for source in _recorded(folder)]


def recorded_last(
    folder: Path,
    phase: Path,
    last: int,
    every: int = 1,
    until: int | None = None,
    max_distance: int | None = None,
) -> list[Path]:
    """Return the sources in a folder's record if last_checkpoints() would choose them, else [].

    Retention may have deleted some of the sources. No other checkpoint of the phase may be newer
    than the first source.
    """
    steps = [source["step"] for source in _recorded(folder)]
    if len(steps) != last or not all(
        isinstance(step, int) and _is_chosen(step, every, until) for step in steps
    ):
        return []
    distances = [after - before for before, after in pairwise(steps)]
    if min(distances, default=1) < 1 or (max_distance and max(distances) > max_distance):
        return []
    sources = [phase / f"step_{step}" for step in steps]
    present = complete_steps(phase, every, until) if phase.is_dir() else []
    others = [path for path in present if step_of(path) > steps[0] and path not in sources]
    return [] if others else sources


def difference(
    folder: Path, sources: Sequence[Path], weights: Sequence[float] | None = None
) -> str:
    """Return why a folder is not the average of these sources, as a verb phrase; "" if it is.

    Compares weights, hashes of the sources on disk, and paths of deleted sources.
    """
    weights, recorded = _weights(sources, weights), _recorded(folder)
    if not recorded:
        return "is not an average"
    asked = _in_words(sources, weights)
    made_of = [Path(source["checkpoint"]) for source in recorded]
    actual = _in_words(made_of, [source["weight"] for source in recorded])
    if len(recorded) != len(sources) or [source["weight"] for source in recorded] != weights:
        return f"is the average of {actual}, not of {asked}"
    for source, path, entry in zip(sources, made_of, recorded, strict=True):
        if source.is_dir():
            if model_hash(source) == entry["hash"]:
                continue
            if path.resolve() == source.resolve():
                return f"is an average of {path.name} before its weights changed"
        elif path.resolve() == source.resolve():
            continue
        return f"is the average of {actual}, not of {asked}"
    return ""


def _in_words(sources: Sequence[Path], weights: Sequence[float]) -> str:
    """Name sources, with their weights if these differ."""
    equal = len(set(weights)) == 1
    pairs = zip(sources, weights, strict=True)
    return ", ".join(str(path) + f" (weight {weight:g})" * (not equal) for path, weight in pairs)


def is_made(output: Path, sources: Sequence[Path], weights: Sequence[float] | None = None) -> bool:
    """Return True if a folder has this average, complete. ValueError if it has anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if other := difference(output, sources, weights):
        raise ValueError(f"{output} exists and {other}; give another --output_dir")
    if problem := find_damage(output):
        raise ValueError(f"{output} is damaged ({problem}); remove it and run the command again")
    return True


def write_average(record: dict[str, Any], output: Path) -> None:
    """Write the weighted mean of a record's sources to a new or empty folder.

    Sums are in float64 and stored in the sources' dtype. Memory: the new model and one tensor.
    Config, tokenizer and chat template come from the last source. An interrupted call leaves no
    folder. ValueError if the sources differ in more than their weights, or are damaged.
    """
    sources = [Path(source["checkpoint"]) for source in record["sources"]]
    weights = [source["weight"] for source in record["sources"]]
    _check_same_model(sources)
    for source in sources:  # folders of other programs have no manifest
        if read_manifest(source) and (problem := find_damage(source, with_state=False)):
            raise ValueError(f"{source} is damaged ({problem}); leave it out")
    size = sum(path.stat().st_size for path in weight_files(sources[-1]))
    check_free_space(output.parent, size, "the average")
    scratch = temporary(output)
    try:
        scratch.mkdir()
        with ExitStack() as stack:
            folders = [_open_tensors(source, stack) for source in sources]
            _check_same_tensors(sources, folders)
            tensors = {name: _mean(name, folders, weights) for name in folders[0]}
            save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(sources[-1] / "config.json", scratch / "config.json")
        copy_files(sources[-1], scratch)
        write_json(scratch / RECORD, record)
        written = [str(path.relative_to(scratch)) for path in scratch.rglob("*") if path.is_file()]
        sums = hash_files(scratch, sorted(written), "sha256")
        write_json(
            scratch / MANIFEST,
            {"hash": "sha256", "metric": None, "milestone": True, "files": sums},
        )
        scratch.rename(output)  # also replaces an empty folder
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _mean(name: str, folders: Sequence[dict[str, Stored]], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of one tensor, in the dtype of the sources."""
    total = torch.zeros(folders[0][name].shape, dtype=torch.float64)
    for tensors, weight in zip(folders, weights, strict=True):
        tensor = tensors[name].file.get_tensor(name)
        total.add_(tensor.double(), alpha=weight)
    mean = total.div_(sum(weights)).to(tensor.dtype)
    if not mean.isfinite().all():
        raise ValueError(f"the mean of {name} is not finite; leave out the checkpoint with NaN")
    return mean


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Stored]:
    """Open a folder's safetensors files, sharded or not, without reading the tensors."""
    tensors = {}
    for path in weight_files(folder):
        try:
            file = stack.enter_context(safe_open(path, "pt"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); restore it from a copy") from error
        for name in file.keys():  # noqa: SIM118 - the file is not a mapping
            header = file.get_slice(name)
            tensors[name] = Stored(file, tuple(header.get_shape()), header.get_dtype())
    return tensors


def _check_same_model(sources: Sequence[Path]) -> None:
    """ValueError if two sources differ in their config or tokenizer."""
    first = sources[0]
    config, tokenizer = vars(read_config(first)), _tokenizer_hash(first)
    for source in sources[1:]:
        other = vars(read_config(source))
        for name in {**config, **other}:
            left, right = config.get(name), other.get(name)
            if left != right:
                cause = " (it changes over the phase)" if name == "rope_theta" else ""
                raise ValueError(
                    f"{name} is {left} in {first} and {right} in {source}{cause}; "
                    "average checkpoints of one model with equal settings"
                )
        if _tokenizer_hash(source) != tokenizer:
            raise ValueError(
                f"{first} and {source} have different tokenizers; average checkpoints of one run"
            )


def _tokenizer_hash(folder: Path) -> str | None:
    path = folder / "tokenizer.json"
    return file_hash(path) if path.is_file() else None


def _check_same_tensors(sources: Sequence[Path], folders: Sequence[dict[str, Stored]]) -> None:
    """ValueError if two sources differ in the name, shape or dtype of a tensor."""
    first = folders[0]
    for source, tensors in zip(sources[1:], folders[1:], strict=True):
        if names := sorted(first.keys() ^ tensors.keys()):
            raise ValueError(
                f"only one of {sources[0]} and {source} has {names[0]}; "
                "average checkpoints of one model"
            )
        for name, (_, shape, dtype) in first.items():
            other = tensors[name]
            if (shape, dtype) != (other.shape, other.dtype):
                raise ValueError(
                    f"{name} is {dtype} {list(shape)} in {sources[0]} and {other.dtype} "
                    f"{list(other.shape)} in {source}; average checkpoints of one shape and dtype"
                )

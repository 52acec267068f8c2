"""Verify checkpoints: the checksum of every file, and that the contents are readable.

python -m scripts.verify_checkpoint checkpoints/quickstart    # a run, a phase or a step_N
python -m scripts.verify_checkpoint checkpoints/quickstart/long_context --model
python -m scripts.verify_checkpoint checkpoints/quickstart/sft/step_250 \\
    --against checkpoints/quickstart/sft/step_500    # two steps of training differ: exit status 1

--model also checks rope theta, YaRN and the document mask. --against compares two checkpoints
bitwise. Exit status 1 if a checkpoint is damaged, wrong or different.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cli import CommandParser, user_errors
from evals.report.trained import settings
from files import step_folders
from models.hf import load_hf
from training.checkpoint_files import (
    find_damage,
    has_state,
    read_manifest,
    read_position,
)
from training.safe_pickle import SafeReader, load, read_index

ReadEntry = Callable[[str], object]  # entry name -> tensor or other value of a checkpoint


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a step_N folder, the folder of a phase, or the folder of a run",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OTHER",
        help="a step_N folder that must have equal weights and state",
    )
    parser.add_argument(
        "--model",
        action="store_true",
        help="load the newest weights; check rope theta, YaRN and the document mask",
    )
    args = parser.parse_args()
    with user_errors():
        folders = find(args.checkpoint)
        pair = [args.checkpoint, args.against]
        if args.against and [folders, find(args.against)] != [[path] for path in pair]:
            raise ValueError("--against compares one step_N folder with another; give two of them")
        damaged = 0
        for folder in [*folders, *([args.against] if args.against else [])]:
            problem = find_damage(folder) or unreadable(folder)
            damaged += problem is not None
            print(f"{folder}: {'DAMAGED: ' + problem if problem else describe(folder)}", flush=True)
        different = (
            list(differences(args.checkpoint, args.against)) if args.against and not damaged else []
        )
        for line in different:
            print(f"DIFFERENT: {line}")
        if args.model and not damaged:
            wrong = list(model_faults(folders[-1]))
            damaged += bool(wrong)
            for line in wrong:
                print(f"WRONG: {line}")
        if args.against and not damaged and not different:
            print("identical, bit for bit")
    raise SystemExit(1 if damaged or different else 0)


def find(path: Path) -> list[Path]:
    """Return the step folders at or under a path, oldest first in each phase."""
    if (path / "config.json").is_file() or path.name.startswith("step_"):
        steps = [path] if path.is_dir() else []
    else:
        steps = [
            step for folder in [path, *sorted(path.glob("*/"))] for step in step_folders(folder)
        ]
    if not steps:
        raise ValueError(
            f"{path} has no step_N folder; give one, or the folder of a phase or a run"
        )
    return steps


def describe(folder: Path) -> str:
    """Return a one-line description of an undamaged step folder."""
    manifest = read_manifest(folder)
    assert manifest
    size = sum((folder / name).stat().st_size for name in manifest["files"])
    metric = "" if manifest.get("metric") is None else f", validation loss {manifest['metric']:.4f}"
    files = f"{len(manifest['files'])} files, {size / 1e9:.3f} GB"
    if not has_state(folder):
        return f"weights only, {files}{metric}"
    position = read_position(folder)
    end = ", end of the phase" if position["step"] == position["phase_end"] else ""
    return f"complete, {files}, {position['phase']} step {position['step']}{end}{metric}"


def model_faults(folder: Path) -> Iterator[str]:
    """Check rotary positions and the document mask of a checkpoint: print figures, yield errors.

    Theta and YaRN must equal the settings in the config of the phase or stage, in logs/<run> or
    logs/<run>/<stage>. Two documents packed in one row must get the same logits as each document
    alone.
    """
    model = load_hf(folder).float().eval()
    theta, context = model.config.rope_theta, model.config.max_position_embeddings
    scaling = model.config.rope_scaling
    phase = folder.resolve().parent
    logs, name = Path("logs") / phase.parent.name, f"{phase.name}.config.yaml"
    path = next((p for p in (logs / name, logs / phase.name / name) if p.is_file()), logs / name)
    run = settings(path)
    setting = run.get("rope_theta")
    first, last = setting if isinstance(setting, list) else (setting, setting)
    if last is None:
        source = f"no {path} to compare with"
    else:
        source = f"as in {path}" if last == theta else f"{path} has {last}"
    scaled = f", {scaling}" if scaling else ""
    print(f"{folder}: rope theta {theta:,.0f} ({source}){scaled}, context {context:,} tokens")
    at_end = (
        not has_state(folder)
        or (position := read_position(folder))["step"] == position["phase_end"]
    )
    if last and last != theta and (at_end or first == last):
        yield f"rope theta is {theta:,.0f}, but {path} has {last:,.0f}"
    expected = (run.get("model") or {}).get("rope_scaling")
    if "model" in run and expected != (asdict(scaling) if scaling else None):
        yield f"model.rope_scaling is {scaling or 'none'}, but {path} has {expected or 'none'}"
    length = min(context, 256)
    tokens = torch.randint(
        model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)
    )
    cut = length // 3
    doc_ids = (torch.arange(length)[None] >= cut).int()
    with torch.no_grad():
        packed = model(tokens, doc_ids=doc_ids)
        separate = torch.cat([model(tokens[:, :cut]), model(tokens[:, cut:])], dim=1)
        mixed = (model(tokens) - packed)[:, cut:].abs().max().item()
    error = (packed - separate).abs().max().item()
    print(
        f"{folder}: document mask: packed and separate logits differ by at most {error:.1e}; "
        f"without the mask by {mixed:.1e}"
    )
    if not error <= 1e-3 * max(1.0, separate.abs().max().item()):
        yield (
            "the logits of packed and separate documents differ: "
            f"the largest difference is {error:.2g}"
        )


def unreadable(folder: Path) -> str | None:
    """Return why weights, trainer.json or the state's index are unreadable, or None."""
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            if not list(file.keys()):
                return "model.safetensors has no weights"
        if has_state(folder):
            position = read_position(folder)
            if f"step_{position['step']}" != folder.name:
                return f"state/trainer.json belongs to step {position['step']}"
            read_index(folder / "state")
    except (SafetensorError, OSError, ValueError, KeyError, EOFError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def differences(first: Path, second: Path) -> Iterator[str]:
    """Yield the differences of two step folders: weights, state (bitwise), trainer.json."""
    with (
        safe_open(first / "model.safetensors", framework="pt") as a,
        safe_open(second / "model.safetensors", framework="pt") as b,
    ):
        yield from _compare("weights", set(a.keys()), set(b.keys()), a.get_tensor, b.get_tensor)
    if not (has_state(first) and has_state(second)):
        if has_state(first) or has_state(second):
            yield f"{second if has_state(first) else first} has no state/"
        return
    (a_names, a_get), (b_names, b_get) = _state(first), _state(second)
    yield from _compare("state", a_names, b_names, a_get, b_get)
    positions = read_position(first), read_position(second)
    for name in sorted(positions[0].keys() | positions[1].keys()):
        values = [json.dumps(position.get(name)) for position in positions]
        if values[0] != values[1]:
            yield f"trainer.json: {name} is {values[0][:80]} and {values[1][:80]}"


def _compare(
    kind: str, a_names: set[str], b_names: set[str], a_get: ReadEntry, b_get: ReadEntry
) -> Iterator[str]:
    for name in sorted(a_names ^ b_names):
        yield f"{kind}: only one checkpoint has {name}"
    for name in sorted(a_names & b_names):
        if not _same(a_get(name), b_get(name)):
            yield f"{kind}: {name}"


def _same(a: object, b: object) -> bool:
    """Return True if type, shape and every bit are equal: NaN equals NaN, 0.0 is not -0.0."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def _state(folder: Path) -> tuple[set[str], ReadEntry]:
    """Return the names in state/, and a function that reads one unsharded entry."""
    reader = SafeReader(folder / "state")
    index = reader.index.state_dict_metadata

    def read(name: str) -> object:
        entry = index[name]
        content: dict[str, object] = {name: None}
        if isinstance(entry, TensorStorageMetadata):
            content[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that no process group exists
            load(content, folder / "state", no_dist=True, reader=reader)
        return content[name]

    return set(index), read


if __name__ == "__main__":
    main()

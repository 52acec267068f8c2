"""Validation text for eval_perplexity: finds the data and chooses the documents or rows to score.

`--dataset` is a data store, a .jsonl file of texts, a .txt file, a folder of .txt files, or a
source or group of sources in the store of the checkpoint's own run. The default is every source of
that store.
"""

import argparse
import hashlib
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cli import int_at_least
from data.corpus.sources import sources_of as corpus_sources
from data.decontamination.benchmarks import stream_jsonl
from data.manifest import file_hash
from data.packing import StreamRows, document_table
from data.shards import TokenShards
from data.tokenizers.bpe import load_tokenizer
from evals.harness import Item
from inference.gguf_tokenizer import tokenizer_folder
from models.hf import resolve_checkpoint
from training.averaging import sources_of
from yaml_file import read_yaml_file

TOKENS = 2**20  # default of --tokens
# Texts are chosen by size before they are encoded. Measured values: docs/performance.md.
BYTES_PER_TOKEN = 4
ADVICE = "give --dataset a data store, a .jsonl or .txt file, or a folder of .txt files"


class Documents(NamedTuple):
    """Documents to score. coverage: source -> scored and available tokens, bytes and documents."""

    items: list[Item]
    coverage: dict[str, dict[str, int]]


def token_count(text: str) -> int:
    """Parse --tokens: 2000000, 2e6, or all (0)."""
    number = 0.0 if text == "all" else float(text)
    if not number.is_integer():  # also inf and nan
        raise ValueError(text)
    return int_at_least(0)(str(int(number)))


def evenly_spaced(lengths: np.ndarray, budget: int) -> np.ndarray:
    """Ascending, evenly spaced indices of documents whose lengths sum to at most `budget`.

    Budget 0 chooses all. A document longer than the budget is chosen alone; the caller truncates
    it.
    """
    count, chosen = len(lengths), np.arange(len(lengths))
    while budget and len(chosen) > 1 and (total := int(lengths[chosen].sum())) > budget:
        chosen = np.arange(size := max(1, len(chosen) * budget // total)) * count // size
    return chosen


# ---- finding the data


def resolve_data(args: argparse.Namespace) -> None:
    """Set args.dataset to an existing path, and args.sources if --dataset names sources.

    Sets args.foreign: whether the text is not from the data store of the checkpoint's run. False if
    no run is known. ValueError if no text is found.
    """
    dataset = args.dataset or args.data
    if dataset is None:
        args.dataset = _run_store(args.checkpoint)
    elif Path(dataset).exists():
        args.dataset = Path(dataset)
    else:
        args.dataset, sources = _find_sources(str(dataset), args.checkpoint)
        if args.sources not in (None, sources):
            names = ", ".join(sources)
            raise ValueError(f"--dataset {dataset} already names {names}; omit --sources")
        args.sources = sources
    if args.dataset.is_dir() and not is_store(args.dataset) and not _txt_files(args.dataset):
        raise ValueError(
            f"{args.dataset} is not a data store (no tokens/) and has no .txt files; {ADVICE}"
        )
    store = _configured_store(args.checkpoint)
    args.foreign = store is not None and args.dataset.resolve() != store.resolve()


def result_name(args: argparse.Namespace) -> str:
    """Name of the results file: "perplexity", with the names of foreign text and of sources."""
    names = [args.dataset.stem] * args.foreign + (args.sources or [])
    return re.sub(r"[^\w.-]+", "-", "_".join(["perplexity", *names]))


def is_store(path: Path) -> bool:
    return (path / "tokens").is_dir()


def _find_sources(name: str, checkpoint: Path) -> tuple[Path, list[str]]:
    """Store and sources for the name of a source or group; it may end in -validation."""
    try:
        store = _run_store(checkpoint)
    except ValueError as error:
        raise ValueError(f"{name} does not exist; {ADVICE}") from error
    present = source_names(store)
    normalised = {source.replace("-", "_").lower(): source for source in present}
    key = name.replace("-", "_").lower()
    for candidate in (key, key.removesuffix("_validation")):
        names = (candidate,) if candidate in normalised else corpus_sources(candidate)
        if normalised.keys() >= set(names):
            return store, [normalised[name] for name in names]
    raise ValueError(
        f"{name} is neither a path nor a source of {store}; "
        f"available sources: {', '.join(present) or 'none'}"
    )


def _run_store(checkpoint: Path) -> Path:
    """Existing data store of the run that wrote a checkpoint; ValueError without one."""
    store = _configured_store(checkpoint)
    if store is None:
        raise ValueError(
            f"no run config under logs/ names the training data of {checkpoint}; {ADVICE}"
        )
    if not is_store(store):
        raise ValueError(f"the data store of {checkpoint}, {store}, is missing; {ADVICE}")
    return store


def _configured_store(checkpoint: Path) -> Path | None:
    """Data store in the config of the run that wrote a checkpoint; for SFT and DPO, of the base
    model. None without such a config.
    """
    folder = checkpoint
    while run := _run_config(folder):
        base, config = run
        if "chat" not in config and "preferences" not in config:  # a pretraining run
            store = (config.get("data") or {}).get("store")
            return base / store if store else None
        folder = resolve_checkpoint(str(base / str(config.get("init_from"))))
    return None


def _run_config(checkpoint: Path) -> tuple[Path, dict[str, Any]] | None:
    """Working folder and config of the run that wrote a checkpoint, or None.

    Searches logs/, first the folders named as those of the checkpoint, for the config whose
    output_dir is the checkpoint's folder; for an average, that of its sources.
    """
    step = checkpoint.resolve()
    folders = (step, step.parent, *(source.resolve().parent for source in sources_of(step)))
    for base in dict.fromkeys((Path.cwd(), *step.parents)):
        paths = (base / "logs").rglob("*.config.yaml")
        for path in sorted(paths, key=lambda path: (path.parent.name not in step.parts, path)):
            try:
                config = read_yaml_file(path)
                output = base / (
                    config["output_dir"] or f"checkpoints/{config['run']}/{config['phase']}"
                )
            except (ValueError, KeyError, TypeError):  # not a run config
                continue
            if output.resolve() in folders:
                return base, config
    return None


def source_names(store: Path) -> list[str]:
    """Sources of a store that have token shards."""
    return sorted(
        path.name
        for path in (store / "tokens").glob("*")
        if path.is_dir() and path.suffix != ".tmp"
    )


def shards_of(args: argparse.Namespace) -> dict[str, TokenShards]:
    """Validation shards of the requested sources.

    ValueError if a source is missing or was tokenized with another tokenizer.
    """
    present = source_names(args.dataset)
    if not present:
        raise ValueError(f"{args.dataset} has no token shards; run scripts.prepare_data")
    _check_sources(args, present)
    shards = {
        name: TokenShards(args.dataset / "tokens" / name, "val") for name in args.sources or present
    }
    for source_shards in shards.values():
        if not _same_tokenizer(args.checkpoint, source_shards, args.dataset / "tokenizer"):
            raise ValueError(
                f"the tokenizers of {source_shards.folder} and {args.checkpoint} differ; "
                "tokenize the store again"
            )
    return shards


def _check_sources(args: argparse.Namespace, present: Iterable[str]) -> None:
    """ValueError if a requested source is missing."""
    if unknown := sorted(set(args.sources or ()).difference(present)):
        raise ValueError(
            f"{args.dataset} has no source {', '.join(unknown)}; available: {', '.join(present)}"
        )


def _same_tokenizer(checkpoint: Path, shards: TokenShards, tokenizer: Path) -> bool:
    """Does the checkpoint's tokenizer reproduce the shards' token ids?

    The files differ for a GGUF file and after chat tokens were added; then vocabularies are
    compared.
    """
    folder = tokenizer_folder(checkpoint)
    if shards.tokenizer == file_hash(folder / "tokenizer.json"):
        return True
    if not (tokenizer / "tokenizer.json").is_file() or shards.tokenizer != file_hash(
        tokenizer / "tokenizer.json"
    ):
        return False
    store, extended = (load_tokenizer(path).get_vocab() for path in (tokenizer, folder))
    return store.items() <= extended.items()


def data_hashes(args: argparse.Namespace) -> dict[str, str]:
    """sha256 of a text file, of a folder's .txt files, or of each source's shard manifest."""
    if is_store(args.dataset):
        files = [shards.folder / "manifest.json" for shards in shards_of(args).values()]
        return {str(path): file_hash(path) for path in files}
    if args.dataset.is_file():
        return {str(args.dataset): file_hash(args.dataset)}
    lines = "".join(
        f"{path.relative_to(args.dataset)} {file_hash(path)}\n" for path in _txt_files(args.dataset)
    )
    return {str(args.dataset): hashlib.sha256(lines.encode()).hexdigest()}


def _txt_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.txt"))


# ---- choosing documents and rows


class ChosenRows(StreamRows):
    """Evenly spaced rows of a validation split: about `tokens` tokens (0: all), at most `limit`.

    The choice depends on neither batch size nor world size.
    """

    def __init__(self, shards: TokenShards, length: int, tokens: int, limit: int | None):
        super().__init__(shards, length)
        if self.count < 1:
            raise ValueError(
                f"{shards.folder} has {len(shards)} validation tokens, too few for one row of "
                f"{length}; give a shorter --sequence_length or increase data.val_fraction"
            )
        size = min(self.count, max(1, tokens // length)) if tokens else self.count
        self.indices = (np.arange(size) * self.count // size)[:limit]
        self.coverage = {"tokens": len(self.indices) * length, "available_tokens": len(shards)}

    def __len__(self) -> int:
        return len(self.indices)

    def fill(
        self, index: int, tokens: np.ndarray, targets: np.ndarray, doc_ids: np.ndarray
    ) -> None:
        super().fill(int(self.indices[index]), tokens, targets, doc_ids)


def documents(args: argparse.Namespace) -> Documents:
    """Return the documents to score, from a store (each begins with bos) or from text files."""
    return _store_documents(args) if is_store(args.dataset) else _texts(args)


def _store_documents(args: argparse.Namespace) -> Documents:
    items, coverage = [], {}
    for source, shards in shards_of(args).items():
        starts, lengths = document_table(shards)
        present = np.flatnonzero(lengths > 1)
        chosen = present[evenly_spaced(lengths[present] - 1, args.tokens)][: args.limit]
        scored = 0
        for i in chosen.tolist():
            length = min(int(lengths[i]), args.tokens + 1 if args.tokens else int(lengths[i]))
            ids = shards.read(int(starts[i]), int(starts[i]) + length)[0]
            items.append(
                Item(f"{source}/{i}", {"text": tuple(ids.tolist()), "stride": args.stride}, source)
            )
            scored += length - 1
        coverage[source] = {"tokens": scored, "available_tokens": len(shards)}
        coverage[source] |= {"documents": len(chosen), "available_documents": len(present)}
    return Documents(items, coverage)


def _texts(args: argparse.Namespace) -> Documents:
    """Read the texts twice, sizes first, so that only the chosen texts are held in memory."""
    sizes: dict[str, array[int]] = defaultdict(lambda: array("q"))
    for _, source, text in _read_texts(args.dataset):
        sizes[source].append(len(text.encode()))
    _check_sources(args, sizes)
    budget = args.tokens * BYTES_PER_TOKEN
    chosen, coverage = dict[str, set[int]](), dict[str, dict[str, int]]()
    for source in args.sources or sizes:
        lengths = sizes[source]
        chosen[source] = set(evenly_spaced(np.asarray(lengths), budget)[: args.limit].tolist())
        coverage[source] = {"bytes": 0, "available_bytes": sum(lengths)}
        coverage[source] |= {"documents": len(chosen[source]), "available_documents": len(lengths)}
    items, numbers = [], Counter[str]()
    for name, source, text in _read_texts(args.dataset):
        number = numbers[source]
        numbers[source] += 1
        if number in chosen.get(source, ()):
            if budget and len(text.encode()) > budget:
                text = text.encode()[:budget].decode(errors="ignore")
            items.append(Item(name, {"text": text, "stride": args.stride}, source))
            coverage[source]["bytes"] += len(text.encode())
    return Documents(items, coverage)


def _read_texts(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield id, source and text of each document of a file or folder."""
    if path.is_dir():
        for file in _txt_files(path):
            yield (
                str(file.relative_to(path)),
                path.resolve().name,
                file.read_bytes().decode(errors="replace"),
            )
    elif path.suffix == ".txt":
        yield path.name, path.stem, path.read_bytes().decode(errors="replace")
    else:
        number = 0
        for number, row in enumerate(stream_jsonl(path), 1):
            if not isinstance(row.get("text"), str):
                raise ValueError(f"row {number} of {path} has no text; fix or remove the line")
            yield str(row.get("id", number)), str(row.get("source", path.stem)), row["text"]
        if not number:
            raise ValueError(f"{path} has no rows")

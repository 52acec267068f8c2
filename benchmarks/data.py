"""MB of text a second on one core of every step of the data pipeline, beside datatrove's stock steps, in one run.

python -m benchmarks.data --output benchmarks/results/data.json

CPU time of this process: medians for single steps, one run for the whole pipeline; text in MB of UTF-8. Stock steps split
English words with spaCy: `pip install spacy` to have them measured too. Loader, tokenizer and decontamination have
benchmarks of their own beside this one.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherRepetitionFilter
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.tokens import DocumentTokenizer
from loguru import logger

from data.decontamination import index as decontamination
from data.decontamination import test_sets as testsets
from data.pipeline.prepare import document_parts, prepare
from data.pipeline.recipe import CleanConfig, Recipe
from data.pipeline.steps import (
    EvalTokenizer,
    Signature,
    WriteShards,
    chosen_filters,
    read_documents,
)
from training.settings import load_settings


def sample(recipe: Recipe, megabytes: float) -> list[Document]:
    """The first documents of every source, in equal parts."""
    found = []
    for source in recipe.sources:
        size = 0
        for part in document_parts(recipe):
            for document in read_documents(Path(part.path)) if part.source == source else ():
                if size > megabytes * 1e6 / len(recipe.sources):
                    break
                size += len(document.text.encode())
                found.append(document)
    return found


def seconds(work: Callable[[], object], repeats: int, children: bool = False) -> float:
    """Median CPU seconds of work()."""

    def clock() -> float:
        used = [
            resource.getrusage(who)
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)[: 1 + children]
        ]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    taken = []
    for _ in range(repeats):
        began = clock()
        work()
        taken.append(clock() - began)
    return statistics.median(taken)


def steps(
    recipe: Recipe, documents: list[Document], scratch: Path
) -> dict[str, Callable[[], object]]:
    """What is timed: each takes all the documents."""
    store = Path(recipe.store).resolve()
    part = document_parts(recipe)[0]
    spacy = find_spec("spacy") is not None
    index = decontamination.build_index(
        {
            name: testsets.load_testset(name, store.parent / "wheels")
            for name in recipe.decontaminate.test_sets
        }
    )

    def filtering(step) -> Callable[[], object]:
        return lambda: [step.filter(document) for document in documents]

    def signing(step) -> Callable[[], object]:
        return lambda: [
            step.get_signature(s) for d in documents if (s := step.get_shingles(d.text)).size
        ]

    def tokenizing() -> None:
        WriteShards([part], scratch / "shards", store / "tokenizer", recipe.val_fraction).run(
            iter(documents)
        )

    def stock_tokenizing() -> None:
        stock = DocumentTokenizer(
            str(scratch / "stock"),
            str(store / "tokenizer" / "tokenizer.json"),
            shuffle_documents=False,
            eos_token=None,
        )
        stock.run(iter(documents))

    config, mask = MinhashConfig(), PIIFormatter()
    languages, quality = (
        chosen_filters(CleanConfig(language="en")),
        chosen_filters(CleanConfig(filters=("gopher_quality",))),
    )
    return {
        "language": filtering(languages[0]),
        "gopher_repetition": filtering(GopherRepetitionFilter(language=EvalTokenizer())),
        **({"gopher_repetition, stock": filtering(GopherRepetitionFilter())} if spacy else {}),
        "gopher_quality": filtering(quality[0]),
        "mask_pii": lambda: [mask.format(document.text) for document in documents],
        "minhash signature": signing(Signature(str(scratch), config)),
        **(
            {"minhash signature, stock": signing(MinhashDedupSignature(str(scratch), config))}
            if spacy
            else {}
        ),
        "decontaminate": lambda: list(index.scan((d.id, d.text) for d in documents)),
        "tokenize and write shards": tokenizing,
        "tokenize and write, stock": stock_tokenizing,
    }


def whole(recipe: Recipe, scratch: Path) -> Callable[[], object]:
    """The whole pipeline in this process, over a store whose documents and tokenizer are the recipe's."""
    store = scratch / "stores" / "store"
    store.mkdir(parents=True)
    for name in ("documents", "tokenizer"):
        (store / name).symlink_to(Path(recipe.store).resolve() / name)
    (scratch / "stores" / "wheels").symlink_to(Path(recipe.store).resolve().parent / "wheels")
    mine = replace(
        recipe, store=str(store), executor=replace(recipe.executor, kind="local", workers=1)
    )

    def run() -> None:
        for made in (*store.glob("work/clean-*"), *store.glob("work/tokens-*"), store / "tokens"):
            shutil.rmtree(made, ignore_errors=True)
        assert prepare(mine) == "done"

    run()  # builds the index of the test sets, which depends on them alone
    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/data/quickstart.yaml"))
    parser.add_argument("--megabytes", type=float, default=5, help="of text for the single steps")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logger.remove()
    recipe = load_settings(Recipe, args.config)
    documents = sample(recipe, args.megabytes)
    size = sum(len(document.text.encode()) for document in documents) / 1e6
    rates = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, work in steps(recipe, documents, Path(scratch)).items():
            rates[name] = size / seconds(work, args.repeats)
            print(f"{name:>28} {rates[name]:8.2f} MB/s", flush=True)
        everything = (
            sum(
                len(d.text.encode())
                for part in document_parts(recipe)
                for d in read_documents(Path(part.path))
            )
            / 1e6
        )
        rates["whole pipeline"] = everything / seconds(
            whole(recipe, Path(scratch)), 1, children=True
        )
        print(
            f"{'whole pipeline':>28} {rates['whole pipeline']:8.2f} MB/s of {everything:.1f} MB, after the index is built"
        )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        machine = {
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "datatrove": version("datatrove"),
        }
        args.output.write_text(
            json.dumps({**machine, "megabytes": size, "mb_per_s_per_core": rates}, indent=2) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()

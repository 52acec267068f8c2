"""Find benchmark items in training data; list the documents, without changing the data.

python -m scripts.decontaminate --train_dataset data/store/quickstart:wikipedia \\
    --test_datasets mmlu,gsm8k,hellaswag,arc
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cli import CommandParser, add_boolean, int_at_least, user_errors, within
from data.corpus.sources import sources_of
from data.decontamination.index import Settings, build_index
from data.decontamination.report import report
from data.decontamination.scan import decontaminate
from data.decontamination.test_sets import Item
from data.texts import text_of
from files import write_text
from ranges import above


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--train_dataset",
        nargs="+",
        required=True,
        help=".parquet and .jsonl(.gz, .zst) files, folders, STORE:SOURCE, known names",
    )
    parser.add_argument(
        "--test_datasets",
        required=True,
        help="comma-separated names, or files with id and text",
    )
    # data/contaminated_ids.json is a deliverable; scripts.deliverables copies a store's file to it
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/contaminated_ids.json"),
        help="default: %(default)s",
    )
    parser.add_argument("--report", type=Path, help="also write the report to this Markdown file")
    add_boolean(
        parser, "--rows", "short rows (SFT, preferences): also find near-duplicates with MinHash"
    )
    parser.add_argument(
        "--workers", type=int_at_least(1), default=1, help="processes; each scans whole files"
    )
    parser.add_argument(
        "--coverage",
        type=within(float, above(0, maximum=1)),
        default=Settings.coverage,
        help="share of an item's information that a document must contain",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("data/store/wheels"),
        help="folder of downloaded test sets",
    )
    args = parser.parse_args()
    with user_errors():
        tests = [name.strip() for name in args.test_datasets.split(",") if name.strip()]
        settings = Settings(coverage=args.coverage)
        trains = [name for text in args.train_dataset for name in _names(text)]
        index, result = decontaminate(
            trains, tests, args.output, args.cache, settings, args.rows, args.workers
        )
        text = report(index, result)
        if args.report:
            write_text(args.report, text + "\n")
        scanned, hits = result["settings"]["documents"], len(result["documents"])
        print(f"{text}\n\n{scanned:,} documents scanned, {hits:,} hit; written to {args.output}")


def _names(text: str) -> tuple[str, ...]:
    """Return the data sets of one --train_dataset value; an existing path is returned unchanged."""
    return (text,) if Path(text).exists() else sources_of(text)


def find_contaminated_examples(
    train_texts: Iterable[str | Mapping[str, Any]] | Mapping[str, str],
    test_texts: Iterable[str | Mapping[str, Any]] | Mapping[str, str],
    settings: Settings | None = None,
) -> set[int | str]:
    """Return the ids of the training texts that contain a test text, by the pipeline's rules.

    The id of a text is its key in a mapping, else its index. On both sides, {"text": ...} is a text
    too. Training texts are streamed, so a generator works. Test texts of fewer than
    Settings.minimum_words (8) words are ignored. ValueError without test texts, if the texts are a
    single str, or if one is not a text.
    """
    if isinstance(train_texts, str) or isinstance(test_texts, str):
        raise ValueError(
            "find_contaminated_examples takes a list of texts; put a single text in a list"
        )
    if isinstance(test_texts, Mapping):
        test_texts = test_texts.values()
    named: Iterable[tuple[Any, Any]] = (
        train_texts.items() if isinstance(train_texts, Mapping) else enumerate(train_texts)
    )
    items = [Item(str(number), (text_of(text),)) for number, text in enumerate(test_texts)]
    ids: dict[str, int | str] = {}

    def documents() -> Iterable[tuple[str, str]]:
        for number, (name, text) in enumerate(named):
            ids[str(number)] = name
            yield str(number), text_of(text)

    hits = build_index({"test": items}, settings or Settings()).scan(documents())
    return {ids[hit.train_id] for hit in hits}


if __name__ == "__main__":
    main()

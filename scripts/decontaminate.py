"""Find items of evaluation sets in training data: writes which documents hold which, and changes no data.

python -m scripts.decontaminate --train_dataset data/store/quickstart:wikipedia --test_datasets mmlu,gsm8k,hellaswag,arc
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cli import CommandParser, add_boolean, at_least, user_errors, within
from data.corpus.sources import sources_of
from data.decontamination.index import Settings, build_index, report
from data.decontamination.scan import decontaminate
from data.decontamination.test_sets import Item
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
        help="names and files with id and text, separated by commas",
    )
    parser.add_argument("--output", type=Path, default=Path("data/contaminated_ids.json"))
    parser.add_argument(
        "--report", type=Path, help="write the report to this file too, as Markdown"
    )
    add_boolean(
        parser, "--rows", "short rows (SFT, preferences): look for similar ones too, by MinHash"
    )
    parser.add_argument("--workers", type=at_least(1), default=1, help="processes, over files")
    parser.add_argument(
        "--coverage",
        type=within(float, above(0, most=1)),
        default=Settings.coverage,
        help="share of an item that counts as holding it",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("data/store/wheels"),
        help="where downloaded test sets are kept",
    )
    args = parser.parse_args()
    with user_errors():
        tests = [name.strip() for name in args.test_datasets.split(",") if name.strip()]
        settings = Settings(coverage=args.coverage)
        trains = [name for given in args.train_dataset for name in _names(given)]
        index, found = decontaminate(
            trains, tests, args.output, args.cache, settings, args.rows, args.workers
        )
        text = report(index, found)
        if args.report:
            write_text(args.report, text + "\n")
        scanned = found["settings"]["documents"]
        print(
            f"{text}\n\n{scanned:,} documents scanned, {len(found['documents']):,} hit; written to {args.output}"
        )


def _names(given: str) -> tuple[str, ...]:
    """The data sets that a name stands for; a path stays a path."""
    return (given,) if Path(given).exists() else sources_of(given)


def find_contaminated_examples(
    train_texts: Iterable[str | Mapping[str, Any]] | Mapping[str, str],
    test_texts: Iterable[str] | Mapping[str, str],
    settings: Settings | None = None,
) -> set[int | str]:
    """Return the ids of training texts that hold a test text, by the rules of the whole pipeline.

    The id of a text is its key in a mapping, else its index; a row may be {"text": ...}. Training
    texts may be a generator: they are streamed. Test texts of fewer than Settings.minimum_words (8) words are
    not looked for. ValueError if there are no test texts, or a single str is given for several.
    """
    if isinstance(train_texts, str) or isinstance(test_texts, str):
        raise ValueError(
            "find_contaminated_examples takes several texts; put a single one in a list"
        )
    if isinstance(test_texts, Mapping):
        test_texts = test_texts.values()
    named: Iterable[tuple[Any, Any]] = (
        train_texts.items() if isinstance(train_texts, Mapping) else enumerate(train_texts)
    )
    items = [Item(str(number), (text,)) for number, text in enumerate(test_texts)]
    ids: dict[str, int | str] = {}

    def documents() -> Iterable[tuple[str, str]]:
        for number, (name, text) in enumerate(named):
            ids[str(number)] = name
            yield str(number), text["text"] if isinstance(text, Mapping) else text

    hits = build_index({"test": items}, settings or Settings()).scan(documents())
    return {ids[hit.train_id] for hit in hits}


if __name__ == "__main__":
    main()

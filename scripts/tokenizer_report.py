"""Measure bytes per token of each source, for the store's tokenizer and for public ones.

python -m scripts.tokenizer_report --store data/store/quickstart \\
    --against gpt2 cl100k_base o200k_base
"""

from pathlib import Path

from cli import CommandParser, user_errors, within
from data.tokenizers.compression import report
from data.tokenizers.public import PUBLIC
from files import write_json
from ranges import above


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--store", type=Path, default=Path("data/store/quickstart"))
    parser.add_argument(
        "--against", nargs="*", default=[*PUBLIC], choices=[*PUBLIC], help="public tokenizers"
    )
    parser.add_argument(
        "--split",
        default="val",
        choices=["val", "train", "all"],
        help="documents to measure on",
    )
    parser.add_argument(
        "--sample_megabytes",
        type=within(float, above(0)),
        default=2.0,
        help="sample size of each source, in MB",
    )
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    with user_errors():
        result = report(args.store, args.against, args.split, int(args.sample_megabytes * 1e6))
        show(result)
        if args.output:
            write_json(args.output, result)


def show(result: dict) -> None:
    names = [*result["vocab_size"]]
    width = max(map(len, [*result["sample_bytes"], "vocabulary"]))
    print(f"bytes per token, {result['split']} documents of {result['store']}")
    print(" " * width, f"{'MB':>7}", *(f"{name:>12}" for name in names))
    print(
        f"{'vocabulary':{width}}",
        " " * 7,
        *(f"{result['vocab_size'][name]:>12,}" for name in names),
    )
    sizes = {**result["sample_bytes"], "all": sum(result["sample_bytes"].values())}
    for source, size in sizes.items():
        print(
            f"{source:{width}}",
            f"{size / 1e6:7.2f}",
            *(f"{result['bytes_per_token'][n][source]:12.3f}" for n in names),
        )


if __name__ == "__main__":
    main()

"""Clean, deduplicate, decontaminate and tokenize a store: <store>/tokens/<source>/.

python -m scripts.prepare_data --config configs/data/quickstart.yaml
python -m scripts.prepare_data --config configs/data/my_run.yaml --train_tokenizer
python -m scripts.prepare_data --config configs/data/nanollama_1b.yaml \\
    executor.kind=slurm executor.partition=cpu

configs/data/my_run.yaml stands for a recipe of scripts.new_recipe.
"""

import os
from pathlib import Path

from cli import CommandParser, user_errors
from data.manifest import read
from data.pipeline.prepare import prepare, train_store_tokenizer
from data.pipeline.recipe import Recipe
from data.pipeline.steps import read_json
from data.shards import SPLITS, TokenShards
from data.tokenizers.bpe import load_tokenizer


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the recipe")
    parser.add_argument(
        "--verify", action="store_true", help="afterwards verify the checksum of every shard"
    )
    parser.add_argument(
        "--train_tokenizer",
        action="store_true",
        help="first train the tokenizer, as scripts.train_tokenizer does",
    )
    parser.add_argument("overrides", nargs="*", help="recipe overrides: section.key=value")
    args = parser.parse_intermixed_args()
    # Imported here because it imports torch, which worker processes of this module do not need.
    from training.settings import load_settings

    # Each task has one core, so its tokenizer must not start a thread per core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with user_errors():
        recipe = load_settings(Recipe, args.config, args.overrides)
        if args.train_tokenizer:
            fresh = train_store_tokenizer(recipe)
            print(f"tokenizer: {'trained' if fresh else 'already there'}", flush=True)
        outcome = prepare(recipe)
        print(outcome)
        if outcome != "submitted":
            show(recipe, args.verify)


def show(recipe: Recipe, verify: bool) -> None:
    """Print the documents and tokens of each source that each step keeps or removes."""
    store, reasons = Path(recipe.store), []
    columns = (
        ("documents", 10),
        ("dropped", 8),
        ("repeated", 8),
        ("test items", 10),
        ("kept", 10),
        ("tokens", 14),
        ("validation", 12),
    )
    print(f"{'source':>16}", *(f"{name:>{width}}" for name, width in columns))
    for name in recipe.sources:
        shards = read(store / "tokens" / name)
        assert shards is not None
        count = shards["report"]
        dropped = {
            key.removeprefix("dropped/"): n
            for key, n in sorted(count.items())
            if key.startswith("dropped/")
        }
        reasons += (
            [f"{name}: {', '.join(f'{n:,} {reason}' for reason, n in dropped.items())}"]
            if dropped
            else []
        )
        train, val = (sum(shard["tokens"] for shard in shards["splits"][split]) for split in SPLITS)
        row = (
            count["documents"],
            sum(dropped.values()),
            count["repeated"],
            count["contaminated"],
            count["kept"],
            train,
            val,
        )
        print(
            f"{name:>16}",
            *(f"{number:>{width},}" for number, (_, width) in zip(row, columns, strict=True)),
        )
        if verify:
            TokenShards(store / "tokens" / name, "train").verify()
    for reason in reasons:
        print(f"dropped from {reason}")
    if separators := (shards or {}).get("document_tokens"):
        tokenizer = load_tokenizer(store / "tokenizer")
        first, last = (
            None if index is None else tokenizer.id_to_token(index) for index in separators.values()
        )
        print(f"documents begin with {first}" + f" and end with {last}" * (last is not None))
    if recipe.decontaminate.test_sets and read_json(store / "report.json")["inputs"] == (
        shards or {}
    ).get("inputs"):
        table = (store / "contamination.md").read_text(encoding="utf-8").split("\n\n")[0]
        ids = store / "contaminated_ids.json"
        print(f"\n{table}\nexamples: {store / 'contamination.md'}; document ids: {ids}")


if __name__ == "__main__":
    main()

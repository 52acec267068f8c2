"""Train a byte-level BPE tokenizer on a sample of a store's training documents: <store>/tokenizer/.

python -m scripts.train_tokenizer --config configs/data/quickstart.yaml
"""

from pathlib import Path

from cli import CommandParser, user_errors
from data.pipeline.prepare import train_store_tokenizer
from data.pipeline.recipe import Recipe
from data.tokenizers.bpe import load_tokenizer
from training.settings import load_settings


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the recipe")
    parser.add_argument("overrides", nargs="*", help="recipe overrides: section.key=value")
    args = parser.parse_intermixed_args()
    with user_errors():
        recipe = load_settings(Recipe, args.config, args.overrides)
        fresh = train_store_tokenizer(recipe)
        folder = Path(recipe.store) / "tokenizer"
        size = load_tokenizer(folder).get_vocab_size()
        print(f"tokenizer of {size:,} tokens {'trained' if fresh else 'already there'}: {folder}")


if __name__ == "__main__":
    main()

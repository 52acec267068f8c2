"""Write a starter recipe and training config for your text.

python -m scripts.new_recipe --name my_run --text my_texts/
python -m scripts.new_recipe --name my_run --text my_texts/ my_notes.csv \\
    hf://Salesforce/wikitext:wikitext-2-raw-v1 --minutes 10

Reads the text into data/store/NAME/ and writes configs/data/NAME.yaml and configs/NAME.yaml,
sized to the amount of text; comments in both files give the reasons. Then prints the commands that
prepare the data and train. It never overwrites a file. docs/own_data.md lists the accepted files.
"""

import shlex
import sys
from dataclasses import fields
from pathlib import Path

from cli import CommandParser, int_at_least, user_errors, within
from data.corpus.ingest import MAX_BAD
from data.pipeline.recipe import Recipe
from data.pipeline.starter_files import (
    ReadSettings,
    config_text,
    named_sources,
    read_sources,
    recipe_text,
    starter_recipe,
)
from data.tokenizers.bpe import SPECIAL_TOKENS
from files import write_text
from ranges import Range, above
from training.config import load
from training.planning.cpu_plan import REFERENCE
from training.planning.plan_files import NAME, check_name
from training.settings import load_settings

BASE = Path("configs/quickstart/base.yaml")
READ = fields(ReadSettings)  # named as the flags
MAX_TOKENS = 100e6  # of each source


def make_parser() -> CommandParser:
    """Return the parser. The messages of the readers name these flags."""
    parser = CommandParser(__doc__)
    parser.add_argument("--name", required=True, help="name of the run, its configs and its store")
    about = "files, folders, globs, or hub data sets as hf://owner/name:config@revision"
    parser.add_argument("--text", nargs="+", required=True, help=about)
    parser.add_argument(
        "--text_column", help="text column of all tables; default: detected and printed"
    )
    parser.add_argument("--id_column", help="default: id")
    parser.add_argument(
        "--split", help="split of a hub data set or save_to_disk folder; default: train"
    )
    parser.add_argument(
        "--vocab_size",
        type=int_at_least(256 + len(SPECIAL_TOKENS)),
        help="default: from the amount of text",
    )
    positive = within(float, above(0))
    parser.add_argument(
        "--minutes",
        type=positive,
        default=3.0,
        help="maximum minutes of training on 2 CPU cores, at least 40 steps (default: 3)",
    )
    about = f"approximate token limit of each source (default: {MAX_TOKENS:g})"
    parser.add_argument("--max_tokens", type=positive, default=MAX_TOKENS, help=about)
    about = "cut .txt and .md files into documents of about this length; default: if necessary"
    parser.add_argument("--document_chars", type=int_at_least(1000), help=about)
    about = f"maximum share of unreadable rows of a source (default: {MAX_BAD})"
    parser.add_argument("--max_bad", type=within(float, Range(0, 1)), default=MAX_BAD, help=about)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    with user_errors():
        store, recipe = Path("data/store") / args.name, Path(f"configs/data/{args.name}.yaml")
        config, checkpoints = Path(f"configs/{args.name}.yaml"), Path("checkpoints") / args.name
        _check_new(args.name, store, recipe, config)
        step = load(BASE).data.tokens_per_step
        settings = ReadSettings(**{field.name: getattr(args, field.name) for field in READ})
        sources = read_sources(store, named_sources(args.text), settings)
        limit = int(60 * args.minutes * REFERENCE / step)
        starter = starter_recipe(store, sources, args.vocab_size, step, limit)
        about = f"Written by python -m scripts.new_recipe {shlex.join(sys.argv[1:])}"
        _write(config, config_text(starter, about), recipe, recipe_text(starter, about))
        print(f"\n{recipe} and {config}: {starter.summary()}\n\nNext:")
        print(f"  python -m scripts.prepare_data --config {recipe} --train_tokenizer")
        print(f"  python train.py --config {config}")
        print("Then, with the beginning of a sentence of your text:")
        checkpoint = checkpoints / "base"
        print(f'  python -m scripts.test_generation --checkpoint {checkpoint} --prompt "The"')


def _write(config: Path, config_yaml: str, recipe: Path, recipe_yaml: str) -> None:
    """Write and load both files; remove them if that fails, so that the command can run again."""
    try:
        write_text(config, config_yaml)
        write_text(recipe, recipe_yaml)
        load_settings(Recipe, recipe)
        load(config)
    except BaseException:
        config.unlink(missing_ok=True)
        recipe.unlink(missing_ok=True)
        raise


def _check_new(name: str, store: Path, recipe: Path, config: Path) -> None:
    """ValueError if the name is invalid or taken. An interrupted call may have begun `store`."""
    if NAME.fullmatch(name):
        for path in (recipe, config, store / "tokenizer", store / "tokens"):
            if path.exists():
                raise ValueError(f"{path} already exists; use another --name or delete it")
        if (store / "documents").is_dir():
            return
    check_name(name)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)

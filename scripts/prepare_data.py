"""Tokenize the documents of a data store into shards: <store>/tokens/<source>/.

python -m scripts.prepare_data --store data/store/quickstart
"""

import argparse
from pathlib import Path

from data.prepare import Split, tokenize_store
from data.shards import SPLITS, TokenShards
from entrypoint import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("data/store/quickstart"))
    parser.add_argument("--val_fraction", type=float, default=Split().val_fraction, help="share of documents held out")
    parser.add_argument("--verify", action="store_true", help="compare every shard with its checksum")
    args = parser.parse_args()
    with user_errors():
        fresh = tokenize_store(args.store, Split(args.val_fraction))
        for folder in sorted((args.store / "tokens").iterdir()):
            train, val = (len(TokenShards(folder, split)) for split in SPLITS)
            if args.verify:
                TokenShards(folder, "train").verify()
            print(f"{folder.name:>12} {train:>10,} tokens to train on, {val:>8,} held out")
        print("tokenized" if fresh else "already there")


if __name__ == "__main__":
    main()

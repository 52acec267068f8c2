"""Train the byte-level BPE tokenizer of a data store on its training documents: <store>/tokenizer/.

python -m scripts.train_tokenizer --store data/store/quickstart --vocab_size 4096
"""

import argparse
from pathlib import Path

from data.prepare import Split, train_store_tokenizer
from entrypoint import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("data/store/quickstart"))
    parser.add_argument("--vocab_size", type=int, default=32_000, help="special tokens and the 256 bytes included")
    parser.add_argument("--val_fraction", type=float, default=Split().val_fraction, help="held-out documents, not trained on")
    args = parser.parse_args()
    with user_errors():
        fresh = train_store_tokenizer(args.store, args.vocab_size, Split(args.val_fraction))
        print(f"tokenizer of {args.vocab_size:,} tokens {'trained' if fresh else 'already there'}: {args.store / 'tokenizer'}")


if __name__ == "__main__":
    main()

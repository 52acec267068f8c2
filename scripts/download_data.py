"""Fetch documents into a data store: <output>/documents/<source>.jsonl.

python -m scripts.download_data --dataset quickstart --output data/store/quickstart
"""

import argparse
from pathlib import Path

from data.manifest import read
from data.prepare import download_quickstart
from entrypoint import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="quickstart", choices=["quickstart"])
    parser.add_argument("--output", type=Path, default=Path("data/store/quickstart"))
    args = parser.parse_args()
    with user_errors():
        fresh = download_quickstart(args.output)
        manifest = read(args.output / "documents")
        assert manifest is not None
        for name, source in manifest["sources"].items():
            size = f"{source['documents']:>6,} documents {source['bytes'] / 1e6:6.2f} MB"
            print(f"{name:>12} {size}  for {source['stands_for']}; {source['licence']}")
        print("fetched" if fresh else "already there")


if __name__ == "__main__":
    main()

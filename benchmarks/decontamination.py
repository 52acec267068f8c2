"""Recall, false positives, speed and memory of decontamination, on real test items planted in real text.

python -m benchmarks.decontamination --output results/decontamination.json
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cli import user_errors
from data.corpus.quickstart_corpus import quickstart_documents
from data.corpus.readers import FileReader
from data.corpus.sources import Document
from data.decontamination.index import Index, Settings, build_index
from data.decontamination.test_sets import Item, load_testset
from data.decontamination.words import hash_words

HOSTS = ("wikipedia", "stem", "factbook")
LENGTHS = (100, 300, 1000, 3000)  # words of a document that an item is planted in
EDITS = {"verbatim": 0, "every 12th word changed": 12, "every 8th word changed": 8}
SHORT = 3_500  # characters of a document, of the size of a web page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hosts",
        nargs="*",
        help="files or folders of clean text; default: Wikipedia and Factbook of the quickstart",
    )
    parser.add_argument("--test_datasets", default="mmlu,gsm8k,hellaswag,arc")
    parser.add_argument(
        "--items", type=int, default=200, help="planted per test set, document length and edit"
    )
    parser.add_argument("--cache", type=Path, default=Path("data/store/wheels"))
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--stream", nargs=3, help=argparse.SUPPRESS
    )  # index, text file, MB: measure memory in a fresh process
    args = parser.parse_args()
    if args.stream:
        print(json.dumps(stream(Path(args.stream[0]), Path(args.stream[1]), int(args.stream[2]))))
        return
    with user_errors():
        sets = {name: load_testset(name, args.cache) for name in args.test_datasets.split(",")}
        hosts = list(read_hosts(args.hosts, args.cache))
        begun = time.perf_counter()
        index = build_index(sets, Settings())
        seconds, size = (
            time.perf_counter() - begun,
            sum(array.nbytes for array in index.arrays.values()),
        )
        results: dict = {"index": {"seconds": seconds, "bytes": size}}
        print(f"index of {sum(index.sizes.values()):,} items: {seconds:.1f} s, {size / 1e6:.0f} MB")
        print(
            "too short to judge: "
            + ", ".join(f"{name} {len(ids)}" for name, ids in index.too_short.items())
            + "\n"
        )
        results["recall"] = recall(index, sets, hosts, args.items)
        results["false_positives"] = false_positives(index, hosts)
        results["speed"] = speed(index, hosts)
        results["memory"] = memory(index, hosts)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read_hosts(paths: list[str] | None, cache: Path) -> Iterator[Document]:
    if not paths:
        for name in HOSTS:
            yield from quickstart_documents(name, cache)
    for path in paths or ():
        yield from (
            document for document in FileReader(path).read() if isinstance(document, Document)
        )


def plant(
    text: str, edit: int, phase: int, host: list[str], length: int, rng: random.Random
) -> str:
    """A document of `length` words of the host text with `text` at a random place, every edit-th word of it replaced."""
    begin = rng.randrange(len(host) - length)
    at = begin + rng.randrange(length + 1)
    words = text.split()
    if edit:
        text = " ".join(
            rng.choice(host) if i % edit == phase else word for i, word in enumerate(words)
        )
    return f"{' '.join(host[begin:at])}\n\n{text}\n\n{' '.join(host[at : begin + length])}"


def recall(
    index: Index, sets: dict[str, list[Item]], hosts: list[Document], count: int
) -> dict[str, dict]:
    """Share of items found: over all phases of the evenly spaced edits, and at the phase where fewest are found."""
    rng = random.Random(0)
    host = " ".join(document.text for document in hosts).split()
    table: dict[str, dict] = {}
    print(
        f"{'recall in %, mean over phases (worst phase)':44}"
        + "".join(f"{name:>18}" for name in sets)
    )
    for edit, every in EDITS.items():
        for length in LENGTHS:
            row = {}
            for name, items in sets.items():
                texts = [(item.id, text) for item in items for text in item.variants]
                rng.shuffle(texts)
                chosen = [
                    (test_id, text)
                    for test_id, text in texts[: 2 * count]
                    if len(hash_words([text])[0]) >= 13
                ][:count]
                found: Counter[int] = Counter()
                for phase in range(max(1, every)):
                    documents = (
                        (str(i), plant(text, every, phase, host, length, rng))
                        for i, (_, text) in enumerate(chosen)
                    )
                    hits = {
                        (hit.train_id, hit.test_id)
                        for hit in index.scan(documents)
                        if hit.test_set == name
                    }
                    found[phase] = sum(
                        (str(i), test_id) in hits for i, (test_id, _) in enumerate(chosen)
                    )
                shares = [100 * found[phase] / len(chosen) for phase in found]
                row[name] = {
                    "items": len(chosen),
                    "mean": statistics.mean(shares),
                    "worst_phase": min(shares),
                }
            table[f"{edit}, {length} words"] = row
            cells = (f"{cell['mean']:.1f} ({cell['worst_phase']:.1f})" for cell in row.values())
            print(f"{f'{edit}, in {length:,} words':44}" + "".join(f"{cell:>18}" for cell in cells))
    return table


def false_positives(index: Index, hosts: list[Document]) -> dict:
    """Every hit in the hosts as they are. Text on the web may well hold an item: look at them."""
    hits = list(index.scan((document.id, document.text) for document in hosts))
    hit = len({hit.train_id for hit in hits})
    print(
        f"\nhits in {len(hosts):,} documents without planted items: {hit} ({100 * hit / len(hosts):.3f} %)"
    )
    for found in hits[:20]:
        print(
            f"  {found.train_id}: {found.rule} {found.score:.2f} {found.test_set} {found.test_id}: {found.excerpt[:100]!r}"
        )
    return {"documents": len(hosts), "hit": hit, "hits": [found._asdict() for found in hits]}


def speed(index: Index, hosts: list[Document], repeats: int = 5) -> dict[str, dict]:
    """MB of UTF-8 a second on one core, median of repeats."""
    text = "\n\n".join(document.text for document in hosts)[: 8 << 20]
    kinds = {
        "web pages of 3.5 KB": [text[i : i + SHORT] for i in range(0, len(text), SHORT)],
        "books of 1 MB": [text[i : i + (1 << 20)] for i in range(0, len(text), 1 << 20)],
    }
    table = {}
    for kind, texts in kinds.items():
        size = sum(len(text.encode()) for text in texts) / 1e6
        seconds = []
        for _ in range(repeats):
            begun = time.process_time()
            list(index.scan((str(i), text) for i, text in enumerate(texts)))
            seconds.append(time.process_time() - begun)
        table[kind] = {
            "documents": len(texts),
            "mb": size,
            "mb_per_s": size / statistics.median(seconds),
        }
        print(f"{kind}: {table[kind]['mb_per_s']:.1f} MB/s of one core")
    return table


def memory(index: Index, hosts: list[Document]) -> dict[str, dict]:
    """Peak resident memory of a process that scans a little text, and ten times as much of it."""
    table = {}
    with tempfile.TemporaryDirectory() as scratch:
        index.save(Path(scratch) / "index")
        index.folder = None
        (Path(scratch) / "text").write_text(
            "\n\n".join(document.text for document in hosts)[: 8 << 20], encoding="utf-8"
        )
        for size in (50, 500):
            command = [
                sys.executable,
                "-m",
                "benchmarks.decontamination",
                "--stream",
                f"{scratch}/index",
                f"{scratch}/text",
                str(size),
            ]
            table[f"{size} MB"] = json.loads(
                subprocess.run(
                    command, check=True, capture_output=True, text=True, encoding="utf-8"
                ).stdout
            )
            print(f"peak memory over {size} MB of text: {table[f'{size} MB']['peak_mb']:.0f} MB")
    return table


def stream(index: Path, path: Path, size: int) -> dict[str, float]:
    text, scanner = path.read_text(encoding="utf-8"), Index.load(index)
    pages = [(str(i), text[i : i + SHORT]) for i in range(0, len(text), SHORT)]
    wanted = size * 1_000_000 // SHORT
    before = resident()
    hits = sum(1 for _ in scanner.scan(pages[i % len(pages)] for i in range(wanted)))
    return {"before_mb": before, "peak_mb": resident(), "hits": hits}


def resident() -> float:
    """Peak resident memory of this process so far, in MB; of that, the index is mapped and shared between processes."""
    [peak] = [
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM")
    ]
    return int(peak.split()[1]) / 1e3


if __name__ == "__main__":
    main()

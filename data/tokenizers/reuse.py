"""Use the tokenizer of a model folder in a data store."""

import shutil
from pathlib import Path

from data import manifest
from data.tokenizers.bpe import config_ids, document_tokens, listed_ids, load_tokenizer
from data.tokenizers.folder import copy_files, tokenizer_files
from files import write_json


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy a model folder's tokenizer, byte for byte; return False if `target` already has it.

    Adds the token that ends documents to the stop tokens of generation_config.json, because a model
    that is trained on documents generates it.
    """
    if not (source / "tokenizer.json").is_file():
        raise ValueError(
            f"tokenizer.folder={source} has no tokenizer.json; give a model folder in Hugging Face "
            "format (hf download OWNER/NAME --local-dir FOLDER fetches one), or write the file "
            "with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    paths = tokenizer_files(source)
    inputs = {"folder": {str(p.relative_to(source)): manifest.file_hash(p) for p in paths}}
    if manifest.is_current(target, inputs):
        return False
    tokenizer = load_tokenizer(source)
    config_ids(source, tokenizer)  # ValueError without a token that separates documents
    scratch = target.with_name(target.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    copy_files(source, scratch)
    first, last = document_tokens(source, tokenizer)
    end = first if last is None else last
    generation = manifest.read_json(scratch / "generation_config.json")
    stops = listed_ids(generation, "eos_token_id")
    if stops and end not in stops:
        generation["eos_token_id"] = [*stops, end]
        write_json(scratch / "generation_config.json", generation)
    manifest.write(scratch, {"inputs": inputs})
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    return True


def ensure_tokenizer(source: Path, target: Path) -> None:
    """Copy a model folder's tokenizer unless `target` has it; ValueError if it has another."""
    files = [folder / "tokenizer.json" for folder in (source, target)]
    if all(path.is_file() for path in files) and len(set(map(manifest.file_hash, files))) > 1:
        raise ValueError(
            f"{target} is another tokenizer than that of tokenizer.folder={source}; choose another "
            "store, or replace it with python -m scripts.train_tokenizer"
        )
    copy_tokenizer(source, target)

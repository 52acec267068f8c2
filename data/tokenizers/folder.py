"""The files of a tokenizer in a Hugging Face folder."""

import shutil
from pathlib import Path

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json", "chat_template_training.jinja"),
)
NAMED_TEMPLATES = "additional_chat_templates"  # folder of NAME.jinja


def tokenizer_files(folder: Path) -> list[Path]:
    """Return a folder's files of tokenizer, generation settings and chat templates."""
    files = [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]
    return files + sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))


def copy_files(source: Path, target: Path) -> None:
    """Copy the tokenizer and the chat templates of a model folder into another folder."""
    for path in tokenizer_files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)

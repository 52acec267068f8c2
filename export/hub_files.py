"""The files of a model on the Hugging Face Hub: an allow-list, a dry run, and the upload.

Nothing outside the allow-list leaves the machine: no optimizer state, logs, manifests or other
files of a checkpoint folder. An upload never deletes a file of the repository.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.chat.folder_templates import template_files
from data.chat.template import TRAINING_TEMPLATE
from data.tokenizers.tiktoken_export import RANKS, SETTINGS
from files import check_free_space, temporary
from inference.gguf_tokenizer import field, open_gguf
from models.hf import check_model_folder, weight_files

CARD = "README.md"
MARK = "<!-- written by scripts/push_to_hub.py -->"  # marks cards that a later upload may replace
COMPANIONS = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", RANKS, SETTINGS, TRAINING_TEMPLATE),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
Content = Path | str  # a path on this machine, or the text of the file


def check_repo(repo: str) -> str:
    """Return a repository name "owner/name"; ValueError if the hub would refuse it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = bool(REPO.fullmatch(repo))
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(
            f"--repo {repo!r} is not a repository name; give owner/name, of letters, digits, -, _ "
            "and ."
        )
    return repo


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Return the files of a checkpoint that may be uploaded: name in the repository -> path.

    ValueError if the folder is missing, is not a checkpoint, or lacks weights or a tokenizer.
    """
    if folder.is_file():
        raise ValueError(f"--checkpoint {folder} is a file; give a checkpoint folder")
    check_model_folder(folder)
    paths = [folder / name for name in COMPANIONS] + weight_files(folder) + template_files(folder)
    files = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    if "tokenizer.json" not in files:
        raise ValueError(
            f"{folder} has no tokenizer.json, so nobody could use the model; copy the tokenizer's "
            "files to that folder"
        )
    return files


def gguf_files(paths: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Return the GGUF files by name; ValueError if one is damaged or from another checkpoint.

    Compares the last norm: all types store it in float32, and every training step changes it.
    """
    files: dict[str, Path] = {}
    for path in paths:
        if path.suffix != ".gguf":
            raise ValueError(f"--gguf {path} is not a .gguf file; scripts.export_gguf writes them")
        reader = open_gguf(path)
        if field(reader, "split.count"):
            raise ValueError(f"{path} is one part of a split file; merge the parts first")
        if not _same_norm(folder, reader):
            raise ValueError(
                f"{path} was not exported from {folder}: its output_norm.weight differs; export it "
                "again with scripts.export_gguf"
            )
        if path.name in files:
            raise ValueError(f"--gguf names two files {path.name}; rename one of them")
        files[path.name] = path
    return files


def _same_norm(folder: Path, reader: Any) -> bool:
    from safetensors import safe_open

    named = [tensor for tensor in reader.tensors if tensor.name == "output_norm.weight"]
    for path in weight_files(folder):
        with safe_open(path, "pt") as weights:
            if named and "model.norm.weight" in weights.keys():  # noqa: SIM118
                norm = weights.get_tensor("model.norm.weight").float().numpy()
                return bool(norm.shape == named[0].data.shape and (norm == named[0].data).all())
    return False


def write_folder(files: Mapping[str, Content], folder: Path) -> None:
    """Write the files of an upload to a new folder; ValueError if it has content already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--dry_run {folder} exists and is not empty; give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    size = sum(size_of(content) for content in files.values())
    check_free_space(folder.parent, size, f"the dry run in {folder}")
    scratch = temporary(folder)
    try:
        for name, content in files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, scratch / name)
            else:
                (scratch / name).write_text(content, encoding="utf-8")
        scratch.rename(folder)  # replaces an empty folder
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def size_of(content: Content) -> int:
    """Return the bytes of a file's content."""
    return content.stat().st_size if isinstance(content, Path) else len(content.encode())


def upload(files: Mapping[str, Content], repo: str, private: bool) -> list[str]:
    """Commit the files to a model repository, which is created if missing; return report lines.

    private: visibility of a new repository; an existing one keeps its own. Files that the hub
    already has are not sent again. A generated card replaces only a card with MARK. ValueError if
    there is no token, if private is set for a public repository, or if the hub refuses or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not (token := get_token()):
        raise ValueError(
            "there is no Hugging Face token; run `hf auth login`, or set HF_TOKEN to a token with "
            "write access"
        )
    api, files = HfApi(token=token), dict(files)
    with _hub_errors(repo):
        exists = api.repo_exists(repo)
        is_private = bool(api.model_info(repo).private) if exists else private
    if private and not is_private:
        raise ValueError(
            f"{repo} exists and is public; give --private false to upload to a public repository"
        )
    visibility = f"{'existing' if exists else 'new'} {'private' if is_private else 'public'}"
    lines = [f"{repo}: {visibility} repository"]
    with _hub_errors(repo):
        if not exists:
            api.create_repo(repo, private=private)
        elif isinstance(files.get(CARD), str) and MARK not in _remote_card(api, repo):
            del files[CARD]
            lines.append(f"{repo}: its {CARD} was not written by this command; left unchanged")
        operations = [
            CommitOperationAdd(name, item.encode() if isinstance(item, str) else item)
            for name, item in files.items()
        ]
        name = repo.partition("/")[2]
        commit = api.create_commit(repo, operations, commit_message=f"Upload {name}")
    address = f"{api.endpoint}/{repo}"
    return [*lines, f"{len(operations)} files are at {address}, commit {commit.oid[:12]}"]


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn any error of the hub or the network into a ValueError of one sentence."""
    try:
        yield
    except Exception as error:  # httpx, OSError, RuntimeError and the hub's own classes
        raise ValueError(_complaint(error, repo)) from error


def _remote_card(api: Any, repo: str) -> str:
    """Return the text of a repository's card; MARK if it has none."""
    if not api.file_exists(repo, CARD):
        return MARK
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo, CARD, local_dir=folder)
        return Path(path).read_text(encoding="utf-8", errors="replace")


def _complaint(error: Exception, repo: str) -> str:
    """Explain a failed upload in one sentence."""
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    statuses = [getattr(getattr(link, "response", None), "status_code", None) for link in chain]
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return "HF_HUB_OFFLINE is set; unset it and run the same command again"
    if 401 in statuses and not isinstance(error, RepositoryNotFoundError):
        return "the hub refused the token; run `hf auth login` with a valid one"
    if 403 in statuses:
        return (
            f"the token may not write to {repo}; use one with write access to "
            f"{repo.partition('/')[0]}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no repository {repo} for this token; check the name and the token"
    return (
        f"uploading to {repo} failed ({type(error).__name__}: {reason}); run the same command "
        "again: it sends only the missing files"
    )


def hidden_names(folder: Path, files: Mapping[str, Content]) -> list[str]:
    """Return the names in a checkpoint folder that are not uploaded, folders with a slash."""
    tops = {name.partition("/")[0] for name in files}
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    return [entry.name + "/" * entry.is_dir() for entry in entries if entry.name not in tops]

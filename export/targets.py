"""Inputs and output files of the GGUF commands: the checkpoint folder, one file per outtype."""

from pathlib import Path

from export.gguf import OUTTYPES
from models.hf import check_model_folder


def checkpoint_folder(path: Path) -> Path:
    """Return the folder if it holds a model and its tokenizer; raise ValueError otherwise."""
    check_model_folder(path)
    if not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"{path} has no tokenizer.json; copy the tokenizer's files there, "
            "because a GGUF file needs them"
        )
    return path


def target_files(outtypes: str, output: str) -> dict[str, Path]:
    """Return outtype -> file of --outtype and --output.

    Raises ValueError for an unknown outtype, or for one file name with several outtypes.
    """
    names = list(
        dict.fromkeys(name.strip().lower() for name in outtypes.split(",") if name.strip())
    )
    unknown = [name for name in names if name not in OUTTYPES]
    if unknown or not names:
        raise ValueError(
            f"--outtype {outtypes}: {unknown[0] if unknown else 'nothing'!r} is not one of "
            f"{', '.join(OUTTYPES)}"
        )
    if len(names) > 1 and "{outtype}" not in output:
        raise ValueError(
            f"--output {output} is one name for {len(names)} files; put {{outtype}} into it"
        )
    targets = {name: Path(output.replace("{outtype}", name)) for name in names}
    folders = [path for path in targets.values() if path.is_dir()]
    if folders:
        raise ValueError(
            f"--output {folders[0]} is a folder; name a file in it, "
            f"such as {folders[0]}/model-{{outtype}}.gguf"
        )
    return targets


def model_name(output: str) -> str:
    """Return the model's name from --output: the file name without type and suffix."""
    return Path(output.replace("{outtype}", "")).stem.strip("-_.")

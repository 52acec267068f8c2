"""Upload a checkpoint, its GGUF files and a model card to the Hugging Face Hub.

python -m scripts.push_to_hub --checkpoint checkpoints/quickstart/dpo \\
    --gguf checkpoints/quickstart/gguf/*.gguf --repo my_name/nanollama --dry_run /tmp/nanollama
python -m scripts.push_to_hub --checkpoint checkpoints/quickstart/dpo \\
    --gguf checkpoints/quickstart/gguf/*.gguf --repo my_name/nanollama --license apache-2.0

A new repository is private unless --private false. Only model, tokenizer, template and license
files are uploaded, never optimizer state or logs. The command deletes nothing on the hub. Run it
again after an interruption: files that have arrived are not sent again.
"""

import json
import re
from argparse import ArgumentTypeError
from pathlib import Path

from cli import CommandParser, boolean, user_errors
from data.chat.folder_templates import template_of
from data.chat.template import is_our_template
from evals.report.hub_card import Choices, hub_card
from evals.report.model_card import OLLAMA_TEMPLATE, SAMPLING, run_name
from export.hub_files import (
    CARD,
    Content,
    check_repo,
    checkpoint_files,
    gguf_files,
    hidden_names,
    size_of,
    upload,
    write_folder,
)
from models.hf import resolve_checkpoint
from training.checkpoint_files import find_damage, read_manifest

STOPS = ["<|im_end|>", "<|im_start|>"]


def license_id(text: str) -> str:
    """Parse the id of a license on the hub, such as apache-2.0."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text):
        raise ArgumentTypeError(f"{text!r} is not a license id such as apache-2.0 or other")
    return text


def language(text: str) -> str:
    """Parse an ISO 639 language code."""
    if not re.fullmatch(r"[a-z]{2,3}", text):
        raise ArgumentTypeError(f"{text!r} is not a language code such as en")
    return text


def parser() -> CommandParser:
    """Return the parser of the flags."""
    flags = CommandParser(__doc__)
    flags.add_argument("--checkpoint", required=True, help="a step or phase folder")
    flags.add_argument(
        "--gguf", nargs="+", type=Path, default=[], help="GGUF files of the checkpoint"
    )
    flags.add_argument("--repo", required=True, help="owner/name of the model repository")
    flags.add_argument(
        "--private",
        nargs="?",
        const=True,
        default=True,
        type=boolean,
        metavar="true|false",
        help="visibility of a new repository (default: true)",
    )
    flags.add_argument(
        "--dry_run", type=Path, metavar="FOLDER", help="write the upload to a new folder instead"
    )
    flags.add_argument("--license", type=license_id, help="license of the model, e.g. apache-2.0")
    flags.add_argument(
        "--language",
        nargs="+",
        type=language,
        default=[],
        help="e.g. en (default: en if all data sets are the project's named ones)",
    )
    flags.add_argument(
        "--base_model", type=check_repo, help="owner/name of the model that the run started from"
    )
    flags.add_argument("--logs", type=Path, help="logs for the card (default: logs/<run>)")
    flags.add_argument("--results", type=Path, help="scores for the card (default: results/<run>)")
    return flags


def main() -> None:
    args = parser().parse_args()
    with user_errors():
        repo, folder = check_repo(args.repo), resolve_checkpoint(args.checkpoint)
        files: dict[str, Content] = {**checkpoint_files(folder)}
        if read_manifest(folder) and (damage := find_damage(folder, with_state=False)):
            raise ValueError(f"{folder} is damaged ({damage}); restore it from a copy")
        ggufs, template = gguf_files(args.gguf, folder), template_of(folder)
        files |= ggufs
        if ggufs and is_our_template(template):  # files that Ollama reads on the hub
            files["template"] = OLLAMA_TEMPLATE
            files["params"] = json.dumps({"stop": STOPS, **SAMPLING}, indent=2) + "\n"
        if (folder / CARD).is_file():
            print(f"the card is {folder / CARD}")
            files[CARD] = folder / CARD
        else:
            run, sizes = run_name(folder), {name: size_of(item) for name, item in files.items()}
            logs, results = args.logs or Path("logs") / run, args.results or Path("results") / run
            choices = Choices(args.license, tuple(args.language), args.base_model)
            card, notes = hub_card(folder, repo, template, sizes, logs, results, choices)
            files[CARD] = card
            for note in notes:
                print(f"note: {note}")
        for name, item in sorted(files.items()):
            print(f"{size_of(item) / 1e6:12,.3f} MB  {name}")
        if hidden := hidden_names(folder, files):
            print(f"not uploaded: {', '.join(hidden)}")
        if args.dry_run:
            write_folder(files, args.dry_run)
            print(f"{args.dry_run} has the {len(files)} files; nothing was uploaded")
        else:
            print("\n".join(upload(files, repo, args.private)))


if __name__ == "__main__":
    main()

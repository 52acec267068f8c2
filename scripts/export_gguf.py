"""Write a checkpoint as GGUF files for llama.cpp, Ollama and LM Studio.

python -m scripts.export_gguf --checkpoint checkpoints/nanollama_1b/sft --outtype f16,q8_0,q4_k_m \
    --outfile gguf/nanollama-1b-{outtype}.gguf

Outtypes: f32, f16, bf16, q8_0, q4_k_m. Beside the files it leaves a Modelfile for Ollama, LM_STUDIO.md, and a model card,
README.md; a file of these names that was not written by this command stays as it is.
"""

import resource
import time
from collections.abc import Iterator
from pathlib import Path

from cli import CommandParser, at_least, user_errors
from export.gguf import OUTTYPES, export, read_config
from files import write_text
from inference.gguf_tokenizer import Vocabulary, read_vocabulary
from models.hf import check_model_folder, newest_step
from scripts.model_card import MARK, lm_studio, model_card, modelfile


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=newest_step,
        help="a step or phase folder, or a Llama, Qwen3 or Qwen3-MoE folder",
    )
    parser.add_argument(
        "--outtype",
        default="f16,q8_0,q4_k_m",
        help=f"one or several, by commas: {', '.join(OUTTYPES)}",
    )
    parser.add_argument(
        "--outfile", required=True, help="where to; {outtype} in it stands for the type"
    )
    parser.add_argument(
        "--threads",
        type=at_least(0),
        default=0,
        help="for quantising; 0: all that this process may use",
    )
    parser.add_argument(
        "--logs",
        type=Path,
        help="what the model card tells of (default: the logs/<run> of the checkpoint)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="scores for the model card (default: the results/<run> of the checkpoint)",
    )
    args = parser.parse_args()
    with user_errors():
        begun = time.monotonic()
        folder = checkpoint_folder(args.checkpoint)
        targets = target_files(args.outtype, args.outfile)
        vocabulary = read_vocabulary(folder, read_config(folder).vocab_size)
        name = Path(args.outfile.replace("{outtype}", "")).stem.strip("-_.") or folder.name
        types = export(folder, targets, vocabulary.put, name, args.threads)
        for outtype, path in targets.items():
            held = ", ".join(f"{count} {kind}" for kind, count in types[outtype].items())
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {held}")
        for line in write_beside(folder, targets, name, vocabulary, args.logs, args.results):
            print(line)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{time.monotonic() - begun:.1f} s, at most {peak:.2f} GB of memory")


def write_beside(
    folder: Path,
    targets: dict[str, Path],
    name: str,
    vocabulary: Vocabulary,
    logs: Path | None,
    results: Path | None,
) -> Iterator[str]:
    """Modelfile, LM_STUDIO.md and README.md beside the last file; yields what became of each."""
    best = list(targets.values())[-1]
    run = next(
        (parent.name for parent in folder.resolve().parents if parent.parent.name == "checkpoints"),
        folder.name,
    )
    template = vocabulary.template
    card = model_card(
        folder,
        targets,
        name,
        template,
        logs or Path("logs") / run,
        results or Path("results") / run,
    )
    texts = {
        "Modelfile": modelfile(best.name, template),
        "LM_STUDIO.md": lm_studio(best.name, template),
        "README.md": card,
    }
    for file, text in texts.items():
        path = best.parent / file
        if path.is_file() and MARK not in path.read_text(errors="replace", encoding="utf-8"):
            yield f"{path} is not of this command and stays as it is"
            continue
        write_text(path, text)
        yield f"{path} written"


def checkpoint_folder(path: Path) -> Path:
    """The folder of a checkpoint with a tokenizer; ValueError says what it lacks."""
    check_model_folder(path)
    if not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"{path} holds no tokenizer.json; copy the tokenizer's files there, a GGUF file carries them"
        )
    return path


def target_files(outtypes: str, outfile: str) -> dict[str, Path]:
    """outtype -> file; ValueError for an unknown one, or for a name that several would share."""
    kinds = list(
        dict.fromkeys(kind.strip().lower() for kind in outtypes.split(",") if kind.strip())
    )
    unknown = [kind for kind in kinds if kind not in OUTTYPES]
    if unknown or not kinds:
        raise ValueError(
            f"--outtype {outtypes}: {unknown[0] if unknown else 'nothing'!r} is none of {', '.join(OUTTYPES)}"
        )
    if len(kinds) > 1 and "{outtype}" not in outfile:
        raise ValueError(
            f"--outfile {outfile} is one name for {len(kinds)} files; put {{outtype}} into it"
        )
    targets = {kind: Path(outfile.replace("{outtype}", kind)) for kind in kinds}
    folders = [path for path in targets.values() if path.is_dir()]
    if folders:
        raise ValueError(
            f"--outfile {folders[0]} is a folder; name a file in it, such as {folders[0]}/model-{{outtype}}.gguf"
        )
    return targets


if __name__ == "__main__":
    main()

"""Compare GGUF files in llama.cpp with their checkpoint: weights, tokens, logits, text and speed.

python -m scripts.check_gguf --checkpoint checkpoints/quickstart/dpo \\
    --gguf checkpoints/quickstart/gguf/nanollama-quickstart-*.gguf

Writes check_gguf.json and check_gguf.md beside the first file. Exit status 1 if a file is wrong.
"""

import sys
from pathlib import Path

import torch

from cli import ROOT, CommandParser, int_at_least, user_errors
from evals.engines import folder_hash
from export.gguf_check import compare, open_gguf, reference, table
from export.gguf_plan import read_config
from export.targets import checkpoint_folder
from files import write_json, write_text
from inference.llamacpp import find_library, library
from models.hf import resolve_checkpoint


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=resolve_checkpoint,
        help="the folder that the files were exported from",
    )
    parser.add_argument("--gguf", required=True, nargs="+", type=Path)
    parser.add_argument(
        "--text",
        type=Path,
        help="text for logits and perplexity (default: this repository's documentation)",
    )
    parser.add_argument(
        "--tokens", type=int_at_least(1), default=2048, help="tokens of the text to score"
    )
    parser.add_argument(
        "--strings",
        type=int_at_least(1),
        default=5500,
        help="strings to encode with both tokenizers",
    )
    parser.add_argument("--threads", type=int_at_least(0), default=0, help="0: all available CPUs")
    parser.add_argument(
        "--output", type=Path, help="JSON file; the Markdown table is written beside it"
    )
    args = parser.parse_args()
    with user_errors():
        folder = checkpoint_folder(args.checkpoint)
        read_config(folder)
        for path in args.gguf:
            open_gguf(path)
        library()
        if args.text and not args.text.is_file():
            raise ValueError(f"--text {args.text} does not exist")
        files = (
            [args.text]
            if args.text
            else [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        )
        text = "\n".join(path.read_text(errors="replace", encoding="utf-8") for path in files)
        if args.threads:
            torch.set_num_threads(args.threads)
        ref = reference(folder, text, args.tokens, args.strings)
        rows = []
        for path in args.gguf:
            rows.append(compare(path, ref, args.threads))
            print(f"{path}: {rows[-1]['verdict']}", *rows[-1]["because"], sep="; ", flush=True)
        runtime = (find_library() or ("",))[0]
        source = {"checkpoint": str(folder), "checkpoint_hash": folder_hash(folder)}
        result = {
            **source,
            "text": [path.name for path in files],
            "runtime": runtime,
            "files": rows,
        }
        output = args.output or args.gguf[0].parent / "check_gguf.json"
        write_json(output, result)
        write_text(output.with_suffix(".md"), table(rows) + "\n")
        print(table(rows))
        sys.exit(any(row["verdict"] == "wrong" for row in rows))


if __name__ == "__main__":
    main()

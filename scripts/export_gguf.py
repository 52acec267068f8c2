"""Export a checkpoint to GGUF files for llama.cpp, Ollama and LM Studio.

python -m scripts.export_gguf --checkpoint checkpoints/quickstart/dpo \\
    --outtype f16,q8_0,q4_k_m --output gguf/nanollama-quickstart-{outtype}.gguf

Outtypes: f32, f16, bf16, q8_0, q4_k_m. Also writes a Modelfile for Ollama, LM_STUDIO.md and the
model card README.md beside the files. It never overwrites files that it did not write.
"""

import resource
import time
from pathlib import Path

from cli import CommandParser, int_at_least, user_errors
from evals.report.model_card import write_companions
from export.gguf import OUTTYPES, write_gguf
from export.gguf_plan import read_config
from export.targets import checkpoint_folder, model_name, target_files
from inference.gguf_tokenizer import read_vocabulary
from models.hf import resolve_checkpoint


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=resolve_checkpoint,
        help="a step or phase folder, or a Llama, Qwen3, Mixtral or Qwen3-MoE folder",
    )
    parser.add_argument(
        "--outtype",
        default="f16,q8_0,q4_k_m",
        help=f"one or more, separated by commas: {', '.join(OUTTYPES)}",
    )
    parser.add_argument(
        "--output", required=True, help="output file; {outtype} is replaced by the outtype"
    )
    parser.add_argument(
        "--threads",
        type=int_at_least(0),
        default=0,
        help="threads for quantisation; 0: all available CPUs",
    )
    parser.add_argument(
        "--logs", type=Path, help="logs for the model card (default: logs/<run> of the checkpoint)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="scores for the model card (default: results/<run> of the checkpoint)",
    )
    args = parser.parse_args()
    with user_errors():
        start = time.monotonic()
        folder = checkpoint_folder(args.checkpoint)
        targets = target_files(args.outtype, args.output)
        vocabulary = read_vocabulary(folder, read_config(folder).vocab_size)
        name = model_name(args.output) or folder.name
        types = write_gguf(folder, targets, vocabulary.put, name, args.threads)
        for outtype, path in targets.items():
            counts = ", ".join(f"{count} {kind}" for kind, count in types[outtype].items())
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {counts}")
        template = vocabulary.template
        for line in write_companions(folder, targets, name, template, args.logs, args.results):
            print(line)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{time.monotonic() - start:.1f} s, peak memory {peak:.2f} GB")


if __name__ == "__main__":
    main()

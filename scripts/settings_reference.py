"""Write the reference of all settings of the training commands.

python -m scripts.settings_reference --output docs/settings.md

The descriptions are the comments beside the fields of the dataclasses in training/, models/ and
data/chat/. `python train.py --help_settings optim` prints one section.
"""

from importlib import import_module
from pathlib import Path

from cli import ROOT, CommandParser, user_errors
from files import write_text
from training.config import RunConfig
from training.settings_reference import page
from training.speedrun import SpeedrunRun


def kinds() -> dict[str, type]:
    """Return training command -> dataclass of its config."""
    return {
        "train.py": RunConfig,
        "train_sft.py": import_module("train_sft").SFTConfig,
        "train_dpo.py": import_module("train_dpo").PreferenceRun,
        "train_gpt.py": SpeedrunRun,
    }


def main() -> None:
    parser = CommandParser(__doc__)
    default = ROOT / "docs" / "settings.md"
    parser.add_argument("--output", type=Path, default=default, help="default: docs/settings.md")
    args = parser.parse_args()
    with user_errors():
        write_text(args.output, page(kinds()))
        print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

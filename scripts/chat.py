"""Chat with a model in the terminal: a checkpoint in PyTorch, a GGUF file in llama.cpp.

python -m scripts.chat --checkpoint checkpoints/quickstart/dpo
python -m scripts.chat --checkpoint checkpoints/quickstart/sft --prompt "What is 17 * 23?"
python -m scripts.chat --checkpoint checkpoints/quickstart/gguf/nanollama-quickstart-q4_k_m.gguf \\
    --serve 8080    # OpenAI-compatible API

/help lists the commands of a chat: new conversation, retry, undo, save. Ctrl-C stops a reply,
Ctrl-D ends the chat. Typed lines are saved for the next chat in
~/.local/state/nanollama/chat_history (or under XDG_STATE_HOME).

Thoughts are printed dim. Tools (arithmetic, dates, units, facts about countries) are executed,
unless --no_tools. A model with another chat template uses that template, without tools. A base
model continues the typed text.
"""

import os
from pathlib import Path

from cli import CommandParser, user_errors
from data.chat.trained_chat import name_of
from inference.chat_formats import CompletionFormat, TemplateFormat
from inference.open_model import open_model, trained_chat
from inference.server import serve
from inference.terminal import add_flags, open_session, run_conversation
from models.hf import resolve_checkpoint


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=resolve_checkpoint,
        help="a .gguf file or a checkpoint folder",
    )
    parser.add_argument(
        "--prompt", nargs="+", help="user messages of one conversation; exit after the last reply"
    )
    parser.add_argument("--max_new_tokens", type=int, default=512, help="token limit of a reply")
    parser.add_argument(
        "--context",
        type=int,
        help="tokens of a conversation (default: the row length of chat training)",
    )
    add_flags(parser)
    parser.add_argument(
        "--serve",
        type=int,
        metavar="PORT",
        help="serve on 127.0.0.1 instead of chatting; 0: any free port",
    )
    parser.add_argument(
        "--api_key",
        metavar="NAME",
        help="with --serve: environment variable that holds the clients' key",
    )
    parser.add_argument(
        "--allow_origin",
        nargs="+",
        default=[],
        metavar="URL",
        help="with --serve: web origins with access, e.g. http://localhost:3000 (default: none)",
    )
    args = parser.parse_args()
    with user_errors():
        if args.serve is not None:
            key = read_key(args.api_key) if args.api_key else ""
            serve(args.checkpoint, args.serve, args.context, key, args.allow_origin)
            return
        if args.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens {args.max_new_tokens} must be at least 1")
        chat, runner = open_model(args.checkpoint, args.context)
        session = open_session(chat, runner, args, args.checkpoint)
        if trained_chat(args.checkpoint) and session.tools:
            names = ", ".join(name_of(tool) for tool in session.tools)
            print(f"context {runner.context:,}, tools: {names}; --context and --tools change them")
        if isinstance(chat, CompletionFormat):
            print("a base model: it continues your text")
        elif isinstance(chat, TemplateFormat):
            print("the model has its own chat template, so no tools are offered")
        run_conversation(session, args, args.prompt, history_file())


def history_file() -> Path | None:
    """Return the file of typed lines in the user's state folder; None without a home folder."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(state, "nanollama", "chat_history")
    return path if path.is_absolute() else None


def read_key(name: str) -> str:
    """Return the API key in an environment variable; ValueError if it is empty."""
    key = os.environ.get(name, "").strip()
    if not key:
        raise ValueError(f"--api_key {name}: the environment variable {name} is not set or empty")
    return key


if __name__ == "__main__":
    main()

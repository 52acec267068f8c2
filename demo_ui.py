"""The demo in a browser: talk to a model, or to two side by side.

python demo_ui.py                                                   # the newest model under checkpoints/
python demo_ui.py --checkpoint checkpoints/nanollama_1b/dpo
python demo_ui.py --gguf gguf/nanollama-1b-q4_k_m.gguf --compare gguf/nanollama-1b-f16.gguf       # --compare checkpoints/..., too
python demo_ui.py --checkpoint checkpoints/nanollama_1b/dpo --share --password ...                # a public link for a week

Needs gradio: pip install -r requirements-demo.txt. Only this machine can open it, unless --share or --host says else.
"""

import hmac
import importlib.util
import time
from pathlib import Path
from typing import Any

from cli import PORT, ROOT, CommandParser, add_boolean, at_least, user_errors
from data.chat.trained_chat import offered
from demo.guard import LOCAL, LOOPBACK, Guard
from demo.markup import SCRIPT
from demo.page import CSS, build
from demo.talk import ChatModel, title
from models.hf import newest_step
from scripts.chat import free_port, load, trained_chat

STAGES = ("midtrain", "sft", "dpo")  # in order; all others are phases of pretraining


def main() -> None:
    parser = CommandParser(__doc__)
    models = parser.add_mutually_exclusive_group()
    about = "a step or phase folder, or any Llama or Qwen3 folder (default: the newest model under checkpoints/)"
    models.add_argument("--checkpoint", type=newest_step, help=about)
    models.add_argument(
        "--gguf", type=Path, help="a file of scripts/export_gguf.py, run by llama.cpp"
    )
    parser.add_argument(
        "--compare", type=newest_step, help="a second model beside it: a folder or a .gguf file"
    )
    parser.add_argument(
        "--context",
        type=at_least(1),
        help="tokens of a conversation (default: those of the training rows)",
    )
    parser.add_argument(
        "--tools",
        nargs="+",
        metavar="NAME",
        help="tools to offer, or all (default: as the model was trained)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="another address lets others in, and needs --password"
    )
    parser.add_argument("--port", type=PORT, default=7860, help="0: any free one")
    add_boolean(parser, "--share", "a public link, by Gradio's servers; needs --password")
    parser.add_argument("--password", help="that visitors must give, under any name")
    args = parser.parse_args()
    with user_errors():
        begun = time.monotonic()
        if importlib.util.find_spec("gradio") is None:
            raise ValueError("the demo needs gradio; pip install -r requirements-demo.txt")
        if (args.share or args.host not in LOOPBACK) and not args.password:
            raise ValueError(
                "with --share or another --host others can open the demo; give a --password for them"
            )
        first = args.checkpoint or args.gguf
        if first is None:
            first = newest_model(Path.cwd(), ROOT)
            print(f"opens {first}, the newest model found; --checkpoint takes another", flush=True)
        port = free_port(args.host, args.port)
        paths = [path for path in (first, args.compare) if path]
        voices = [open_voice(path, args.context, args.tools) for path in paths]
        page = build(voices)
        url = launch(page, args.host, port, args.password, args.share)
        print(f"{url} after {time.monotonic() - begun:.1f} s; Ctrl-C ends it", flush=True)
        page.block_thread()


def newest_model(*places: Path) -> Path:
    """The newest model folder under checkpoints/ of the first place that has one; ValueError without any.

    One of a later stage comes first: DPO, SFT, mid-training, pretraining.
    """
    for place in places:
        found = []
        for config in place.glob("checkpoints/**/config.json"):
            folder = config.parent
            if folder.suffix == ".tmp" or not any(folder.glob("model*.safetensors")):
                continue
            is_step = folder.name.startswith("step_")
            stage = folder.parent.name if is_step else folder.name
            rank = STAGES.index(stage) if stage in STAGES else -1
            found.append(
                (rank, config.stat().st_mtime_ns, folder)
            )  # the folder's own time changes when it is pruned
        if found:
            return max(found)[2]
    raise ValueError(
        "there is no model under checkpoints/; give --checkpoint or --gguf, or make one: make quickstart"
    )


def launch(
    page: Any, host: str, port: int, password: str | None = None, share: bool = False
) -> str:
    """Serve the page in a thread; its address. ValueError where no public link could be made."""
    auth = password and (lambda _, word: hmac.compare_digest(word.encode(), password.encode()))
    quiet: dict[str, Any] = {
        "quiet": True,
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "mcp_server": False,
    }
    hosts = LOCAL if host in LOOPBACK and not share else ()
    guard = {"middleware": [(Guard, (), {"hosts": hosts, "same_origin": not share})]}
    how = {
        "server_name": host,
        "server_port": port,
        "share": share,
        "auth": auth,
        "css": CSS,
        "show_error": True,
    }
    how |= {"head": SCRIPT, "app_kwargs": guard}
    page.launch(prevent_thread_lock=True, **how, **quiet)
    if share and not page.share_url:
        raise ValueError(
            "no public link could be made: Gradio's servers were not reached; try without --share"
        )
    return page.share_url or page.local_url


def open_voice(path: Path, context: int | None, tools: list[str] | None = None) -> ChatModel:
    """A model of a folder or of a file; ValueError says what it is not. tools: names, default: as it was trained."""
    chat, runner = load(path, context)
    return ChatModel(title(path), runner, chat, offered(trained_chat(path), tools))


if __name__ == "__main__":
    main()

"""Web demo: chat with a model, or with two side by side.

python demo_ui.py                                    # the newest run under checkpoints/
python demo_ui.py --checkpoint checkpoints/quickstart/dpo --compare checkpoints/quickstart/sft
python demo_ui.py --gguf checkpoints/quickstart/gguf/nanollama-quickstart-q4_k_m.gguf
python demo_ui.py --checkpoint checkpoints/quickstart/dpo --share --password my_password    # public

Needs gradio (pip install -r requirements-demo.txt). Binds to localhost unless --host or --share is
given. A public link is valid for a week.
"""

import hmac
import importlib.util
import time
from pathlib import Path
from typing import Any

from cli import PORT, ROOT, CommandParser, add_boolean, int_at_least, user_errors
from demo.guard import LOCAL, LOOPBACK, Guard
from demo.markup import SCRIPT
from demo.page import CSS, build
from demo.talk import open_chat_model
from files import step_number
from inference.server import free_port
from models.hf import resolve_checkpoint
from training.planning.stages import skipped_stages

STAGES = ("midtrain", "sft", "dpo")  # in order; all other folders are pretraining phases


def main() -> None:
    parser = CommandParser(__doc__)
    models, flag = parser.add_mutually_exclusive_group(), parser.add_argument
    about = "step, phase, Llama or Qwen3 folder (default: newest run in checkpoints/)"
    models.add_argument("--checkpoint", type=resolve_checkpoint, help=about)
    models.add_argument("--gguf", type=Path, help="file of scripts/export_gguf.py, for llama.cpp")
    flag("--compare", type=resolve_checkpoint, help="a second model: a folder or a .gguf file")
    flag("--context", type=int_at_least(1), help="tokens of a conversation (default: as trained)")
    flag("--tools", nargs="+", metavar="NAME", help="tools, or all (default: of chat training)")
    about = "address to bind to; any address but localhost needs --password"
    flag("--host", default="127.0.0.1", help=about)
    flag("--port", type=PORT, default=7860, help="0: any free port")
    add_boolean(parser, "--share", "create a public link on Gradio's servers; needs --password")
    flag("--password", help="password for visitors; any user name is accepted")
    args = parser.parse_args()
    with user_errors():
        start = time.monotonic()
        if importlib.util.find_spec("gradio") is None:
            raise ValueError("the demo needs gradio; run pip install -r requirements-demo.txt")
        if (args.share or args.host not in LOOPBACK) and not args.password:
            raise ValueError("--share and --host open the demo to other machines; set a --password")
        first = args.checkpoint or args.gguf
        if first is None:
            first = newest_model(Path.cwd(), ROOT)
            print(f"opening {first}, of the newest run; --checkpoint opens another", flush=True)
        port = free_port(args.host, args.port)
        paths = [path for path in (first, args.compare) if path]
        page = build([open_chat_model(path, args.context, args.tools) for path in paths])
        url = launch(page, args.host, port, args.password, args.share)
        print(f"{url} (ready in {time.monotonic() - start:.1f} s); Ctrl-C stops it", flush=True)
        page.block_thread()


def newest_model(*roots: Path) -> Path:
    """Return the model to open under checkpoints/ of the first root that has one, else ValueError.

    Chooses the run with the newest chat model, then the newest model of its furthest stage that the
    run's plan did not skip.
    """
    for root in roots:
        runs: dict[Path, list[tuple[int, int, Path]]] = {}  # -> (stage, time, folder) of its models
        for config in root.glob("checkpoints/**/config.json"):
            folder = config.parent
            if folder.suffix == ".tmp" or not any(folder.glob("model*.safetensors")):
                continue
            stage = folder if step_number(folder) is None else folder.parent
            rank = STAGES.index(stage.name) if stage.name in STAGES else -1
            if rank >= 0 and stage.name in skipped_stages(root / "logs" / stage.parent.name):
                rank = -2
            # Retention changes the modification time of the folder, but not of config.json.
            runs.setdefault(stage.parent, []).append((rank, config.stat().st_mtime_ns, folder))
        if runs:
            newest = max(runs.values(), key=lambda run: max((rank >= 0, at) for rank, at, _ in run))
            return max(newest)[2]
    text = "no model found under checkpoints/; give --checkpoint or --gguf, or run make quickstart"
    raise ValueError(text)


def launch(
    page: Any, host: str, port: int, password: str | None = None, share: bool = False
) -> str:
    """Serve the page in a thread; return its URL. ValueError if the public link fails."""
    auth = password and (lambda _, word: hmac.compare_digest(word.encode(), password.encode()))
    hosts = LOCAL if host in LOOPBACK and not share else ()
    guard = {"middleware": [(Guard, (), {"hosts": hosts, "same_origin": not share})]}
    disabled = dict(footer_links=[], run_history=False, ssr_mode=False, mcp_server=False)
    server = dict(server_name=host, server_port=port, share=share, auth=auth, app_kwargs=guard)
    look: dict[str, Any] = dict(css=CSS, head=SCRIPT, show_error=True, quiet=True)
    page.launch(prevent_thread_lock=True, **server, **look, **disabled)
    if share and not page.share_url:
        raise ValueError("Gradio's servers are not reachable for a public link; omit --share")
    return page.share_url or page.local_url


if __name__ == "__main__":
    main()

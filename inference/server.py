"""Serve a GGUF file with llama.cpp's server on 127.0.0.1, behind inference/gateway.py."""

import signal
import socket
import tempfile
import threading
from pathlib import Path

from data.chat.bounded_template import BoundedTemplate
from data.chat.trained_chat import parse
from inference.gateway import Gateway, special_tokens
from inference.gguf_tokenizer import TRAINED, field, file_templates, json_of, open_gguf
from inference.llamacpp import probe
from inference.open_model import check_context


def serve(path: Path, port: int, context: int | None, key: str, origins: list[str]) -> None:
    """Answer OpenAI-compatible requests until SIGINT or SIGTERM.

    port: 0 takes any free port. key: the API key that clients must send; "": none.
    origins: web origins that may use the server. ValueError if llama.cpp cannot serve the file.
    """
    reader = open_gguf(path)
    special = special_tokens(reader)
    check_context(context)
    probe(path)
    trained = parse(json_of(field(reader, TRAINED)))
    for template in file_templates(reader).values():
        # llama.cpp renders templates without limits, so render each within limits first.
        BoundedTemplate(template).render([{"role": "user", "content": "Hello"}])
    try:
        import xllamacpp
    except ImportError:
        raise ValueError("--serve needs xllamacpp; pip install xllamacpp") from None
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context or (trained.context if trained else 0)
    params.verbosity = 1
    params.model_alias = {str(field(reader, "general.name") or path.stem)}
    params.ui = params.endpoint_slots = False
    params.cors_origins = ""
    port = free_port("127.0.0.1", port)
    signals = [signal.SIGINT, signal.SIGTERM]
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the server's threads inherit it
    with tempfile.TemporaryDirectory(prefix="nanollama-serve-") as folder:  # mode 0700
        params.hostnames = [f"{folder}/llama.sock"]
        try:
            server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ValueError(f"llama.cpp cannot serve {path}: {error}") from error
        gateway = Gateway(
            port, server.listening_address.removeprefix("unix://"), special, key, origins
        )
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        print(f"serving OpenAI's API at http://127.0.0.1:{port}/v1; Ctrl-C stops it", flush=True)
        signal.sigwait(signals)


def free_port(host: str, port: int) -> int:
    """Return the port, or any free one for 0; raise ValueError if it cannot be opened."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"cannot open {host}:{port} ({error}); give another port, or 0 for any free one"
            ) from None
        return int(probe_socket.getsockname()[1])

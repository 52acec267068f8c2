"""A local Hugging Face hub that serves data sets from a folder."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse


@contextmanager
def local_hub(folder: Path, commit: str, gated: bool = False) -> Iterator[str]:
    """Serve <folder>/<owner>/<name>/... as data sets of one commit; yield the HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(revision|tree)/([^/]+)/?(.*)", path)
            file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
            if (api and api[3] not in ("main", commit)) or not (api or file):
                self.answer(404, b"{}", X_Error_Code="RevisionNotFound" if api else "EntryNotFound")
            elif api and api[2] == "revision":
                self.answer(
                    200,
                    json.dumps({"id": api[1], "sha": commit, "siblings": [], "tags": []}).encode(),
                )
            elif api:
                root = folder / api[1]
                self.answer(
                    200,
                    json.dumps(
                        [entry(path, root) for path in sorted((root / api[4]).iterdir())]
                    ).encode(),
                )
            elif gated:
                self.answer(403, b"{}", X_Error_Code="GatedRepo")
            else:
                data = (folder / file[1] / file[3]).read_bytes()
                first, last = re.fullmatch(
                    r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-")
                ).groups()
                chunk = data[int(first) : int(last or len(data)) + 1]
                where = f"bytes {first}-{int(first) + len(chunk) - 1}/{len(data)}"
                etag = f'"{hashlib.sha256(data).hexdigest()}"'
                self.answer(206, chunk, Content_Range=where, X_Repo_Commit=commit, ETag=etag)

    def entry(path: Path, root: Path) -> dict:
        name = path.relative_to(root).as_posix()
        kind = "directory" if path.is_dir() else "file"
        return {
            "type": kind,
            "oid": hashlib.sha1(name.encode()).hexdigest(),
            "size": path.stat().st_size,
            "path": name,
        }

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

"""scripts.push_to_hub against a local stand-in of the hub: files, card, resume, mistakes."""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import complaint_of
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from scripted import THINKS, scripted_model

from evals.engines import folder_hash
from export.gguf import write_gguf
from export.hub_files import MARK
from inference.chat_formats import open_chat_format
from inference.gguf_tokenizer import read_vocabulary
from inference.runners import TorchRunner
from inference.sampling import Sampling
from models.hf import read_hf_config
from scripts import push_to_hub
from training.checkpoint_files import hash_files

TOKEN, REPO = "hf_stand_in", "someone/tiny"
PRIVATE = {  # what a checkpoint folder may contain besides the model
    "state/optimizer.distcp": "moments",
    "manifest.json": "{}",
    ".env": "HF_TOKEN=secret",
    "metrics.jsonl": "{}",
    "token": "secret",
    "notes.txt": "private",
    ".git/config": "secret",
    "additional_chat_templates/key.pem": "secret",
}


class Hub(ThreadingHTTPServer):
    """The endpoints of the hub that an upload calls, with Git LFS instead of Xet."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}  # name -> {"private", "files": {path: bytes}}
        self.lfs: dict[str, bytes] = {}  # sha256 -> content
        self.sent: list[str] = []  # sha256 of each upload
        self.refused: set[str] = set()  # sha256 of contents that fail

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path, hub = self.path.partition("?")[0], self.server
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            hub.sent.append(match[1])
            if match[1] in hub.refused:
                return self.answer(400, {"error": "connection lost"})
            assert hashlib.sha256(body).hexdigest() == match[1]
            hub.lfs[match[1]] = body
            return self.answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            request = json.loads(body)
            if request["organization"] != REPO.partition("/")[0]:
                return self.answer(403, {"error": "You don't have the rights"})
            name = f"{request['organization']}/{request['name']}"
            hub.repos[name] = {"private": request["visibility"] == "private", "files": {}}
            return self.answer(200, {"url": f"{hub.url}/{name}"})
        match = re.match(r"/(?:api/models/)?([^/]+/[^/.]+)", path)
        assert match, path
        repo, rest = hub.repos.get(match[1]), path[match.end() :]
        if repo is None:
            return self.answer(404, {"error": "none"}, X_Error_Code="RepoNotFound")
        return self.of_repo(match[1], repo, rest, body)

    def of_repo(self, name: str, repo: dict[str, Any], rest: str, body: bytes) -> None:
        files, hub = repo["files"], self.server
        if rest in ("", "/revision/main"):
            info = {"id": name, "private": repo["private"], "sha": "c" * 40, "siblings": []}
            self.answer(200, info)
        elif rest.startswith("/resolve/main/"):
            content = files.get(rest.removeprefix("/resolve/main/"))
            if content is None:
                self.answer(404, {}, X_Error_Code="EntryNotFound")
            else:
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.answer(200, content, ETag=etag, X_Repo_Commit="c" * 40)
        elif rest == "/preupload/main":
            modes = []
            for entry in json.loads(body)["files"]:
                large = entry["path"].endswith((".safetensors", ".gguf"))
                content = files.get(entry["path"])
                blob = b"blob %d\0" % len(content or b"") + (content or b"")
                digest = hashlib.sha256(content or b"") if large else hashlib.sha1(blob)
                known = {} if content is None else {"oid": digest.hexdigest()}
                mode = "lfs" if large else "regular"
                modes.append(
                    {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, **known}
                )
            self.answer(200, {"files": modes})
        elif rest == ".git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for entry in objects:
                if entry["oid"] not in hub.lfs:
                    entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif rest == "/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.lfs[value["oid"]]
                else:
                    assert line["key"] == "header", line
            self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/c", "commitOid": "d" * 40})
        else:
            raise AssertionError(rest)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # read from HF_ENDPOINT at import
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of a run with private files beside the model, and its GGUF file."""
    root = tmp_path_factory.mktemp("run")
    folder = root / "checkpoints" / "mine" / "sft" / "step_5"
    scripted_model(folder, THINKS)
    shutil.rmtree(folder / "base")
    file = root / "tiny-q8_0.gguf"
    vocabulary = read_vocabulary(folder, read_hf_config(folder).vocab_size)
    write_gguf(folder, {"f32": file}, vocabulary.put, "tiny", say=lambda line: None)
    for name, content in PRIVATE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder, file


@pytest.fixture
def push(
    model: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    def run(*flags: Any, repo: str = REPO) -> str:
        folder, file = model
        words = ["--checkpoint", folder, "--gguf", file, "--repo", repo, *flags]
        words += ["--logs", tmp_path / "logs", "--results", tmp_path / "results"]
        monkeypatch.setattr("sys.argv", ["push_to_hub", *map(str, words)])
        push_to_hub.main()
        return capsys.readouterr().out

    return run


def tree(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_upload_is_the_dry_run_and_has_no_private_file(hub, push, model, tmp_path):
    shown = push("--dry_run", tmp_path / "dry", "--license", "apache-2.0")
    assert not hub.repos and "nothing was uploaded" in shown
    assert "not uploaded: .env, .git/, additional_chat_templates/, manifest.json" in shown
    dry = tree(tmp_path / "dry")
    assert not set(PRIVATE) & set(dry) and not any(b"secret" in text for text in dry.values())
    assert {"config.json", "model.safetensors", "tokenizer.json", "template"} < set(dry)
    shown = push("--license", "apache-2.0")
    assert "new private repository" in shown and hub.repos[REPO]["private"]
    assert hub.repos[REPO]["files"] == dry
    assert json.loads(dry["params"])["stop"] == ["<|im_end|>", "<|im_start|>"]
    chat, runner = open_chat_format(tmp_path / "dry"), TorchRunner(tmp_path / "dry")
    prompt = chat.prompt([{"role": "user", "content": "Hi"}])
    reply = chat.parse(list(runner.generate(prompt, 20, Sampling(), 0, chat.stop_ids)))
    assert (reply.thought, reply.content, reply.ended) == ("Add them", "It is four.", True)


def test_an_interrupted_upload_continues_and_an_equal_one_sends_nothing(hub, push, model, capsys):
    digest = hashlib.sha256(model[1].read_bytes()).hexdigest()
    hub.refused.add(digest)
    with pytest.raises(SystemExit):
        push()
    assert "uploading to someone/tiny failed (RuntimeError" in capsys.readouterr().err
    assert len(hub.sent) == 2 and not hub.repos[REPO]["files"]  # no half a commit
    hub.refused.clear()
    hub.sent.clear()
    push()
    assert hub.sent == [digest] and "tiny-q8_0.gguf" in hub.repos[REPO]["files"]
    hub.sent.clear()
    push()
    assert not hub.sent


def test_nothing_of_others_is_deleted_or_replaced(hub, push):
    others = {"README.md": b"# By hand", "other.bin": b"kept", "config.json": b"{}"}
    hub.repos[REPO] = {"private": True, "files": dict(others)}
    shown = push()
    files = hub.repos[REPO]["files"]
    assert "its README.md was not written by this command; left unchanged" in shown
    assert files["README.md"] == others["README.md"] and files["other.bin"] == b"kept"
    assert len(files["config.json"]) > 2
    files["README.md"] = f"---\n---\n{MARK}\nold".encode()
    assert "left unchanged" not in push() and b"# tiny" in files["README.md"]


def test_visibility_changes_only_when_asked_for(hub, push, capsys):
    hub.repos[REPO] = {"private": False, "files": {}}
    for flags in ((), ("--private",), ("--private", "true")):
        with pytest.raises(SystemExit):
            push(*flags)
        assert "exists and is public; give --private false" in capsys.readouterr().err
    assert not hub.repos[REPO]["files"]
    assert "existing public repository" in push("--private", "false")
    hub.repos.clear()
    assert "new public repository" in push("--private", "false")
    assert not hub.repos[REPO]["private"]


def results_of(folder: Path, results: Path) -> None:
    results.mkdir()
    acc = {"value": 0.26, "stderr": 0.004, "n": 14042}
    limited = {"value": 0.5, "stderr": 0.05, "n": 100}
    for task, metrics, shots, digest in (
        ("mmlu", {"acc": acc}, 5, folder_hash(folder)),
        ("choice", {"piqa_acc_norm": limited, "piqa_acc": limited}, 0, folder_hash(folder)),
        ("gsm8k", {"flexible": acc}, 8, "another checkpoint"),
        (
            "perplexity",
            {"bits_per_byte": {"value": 1.5, "stderr": None}},
            None,
            folder_hash(folder),
        ),
    ):
        content = {"task": task, "metrics": metrics, "checkpoint_hash": digest}
        content |= {"shots": shots, "n": 14042} if shots is not None else {}
        (results / f"{task}.json").write_text(json.dumps(content), encoding="utf-8")


def run_of(logs: Path, store: Path, base: str | None) -> None:
    """Write the logs of pretraining, unless there is a base, and of SFT."""
    (logs / "sft").mkdir(parents=True)
    sources = {
        "chat": {"path": "hf://HuggingFaceTB/smoltalk2@fc6cc21"},
        "own": {"path": "/home/me/secret.jsonl"},
        "unused": {"path": "hf://not/used"},
    }
    config = {
        "init_from": base or str(logs.parent / "phase1" / "step_3"),
        "steps": 5,
        "optim": {"lr": 1e-4},
        "data": {"mix": {"chat": 1.0} if base is None else {"chat": 0.5, "own": 0.5}},
        "chat": {"sources": sources},
    }
    (logs / "sft" / "sft.config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    row = {"phase": "sft", "step": 5, "tokens": 500, "loss": 1.0, "val/loss": 1.25}
    (logs / "sft" / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    if base:
        return
    data = {"store": str(store), "mix": {"web": 1.0}, "sequence_length": 64}
    (logs / "phase1.config.yaml").write_text(yaml.safe_dump({"data": data}), encoding="utf-8")
    row = {"phase": "phase1", "step": 3, "tokens": 300, "loss": 2.0}
    (logs / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    folder = store / "documents" / "web"
    folder.mkdir(parents=True)
    manifest = {"origin": f"HuggingFaceFW/fineweb-edu@{'8' * 40}", "licence": "ODC-By 1.0"}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    counts = {"web": {"documents": 9, "kept": 8, "train_tokens": 1234}}
    (store / "report.json").write_text(json.dumps({"sources": counts}), encoding="utf-8")


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_has_what_the_run_recorded_and_no_path(push, model, tmp_path):
    results_of(model[0], tmp_path / "results")
    run_of(tmp_path / "logs", tmp_path / "store", base=None)
    shown = push("--dry_run", tmp_path / "dry", "--license", "apache-2.0")
    head, body = card_of(tmp_path / "dry")
    assert (head["license"], head["pipeline_tag"]) == ("apache-2.0", "text-generation")
    assert (head["library_name"], head["language"]) == ("transformers", ["en"])
    assert head["datasets"] == ["HuggingFaceFW/fineweb-edu", "HuggingFaceTB/smoltalk2"]
    assert "base_model" not in head and "note:" not in shown
    [index] = head["model-index"]
    assert index["name"] == "tiny"
    measured = {
        entry["dataset"]["type"]: [
            (metric["type"], metric["value"], metric["args"]["n"], metric["args"]["num_fewshot"])
            for metric in entry["metrics"]
        ]
        for entry in index["results"]
    }
    assert measured == {
        "cais/mmlu": [("acc", 26.0, 14042, 5)],
        "baber/piqa": [("acc_norm", 50.0, 100, 0)],
    }
    assert "| perplexity | bits_per_byte | 1.5 |" in body and "gsm8k" not in body
    assert "| web | HuggingFaceFW/fineweb-edu | ODC-By 1.0 | 9 | 8 | 1,234 |" in body
    assert (
        "| sft | HuggingFaceTB/smoltalk2 | 1.250 | - |" in body
        and "| phase1 | 1 | 300 | 64 |" in body
    )
    assert str(tmp_path) not in body and str(model[0].parent) not in body and "/home" not in body


@pytest.mark.parametrize(
    ("base", "flags", "expected"),
    [
        ("/c/hub/models--Qwen--Qwen3-0.6B-Base/snapshots/da87", (), "Qwen/Qwen3-0.6B-Base"),
        ("/home/me/smol", (), None),
        ("/home/me/smol", ("--base_model", "HuggingFaceTB/SmolLM2-135M"), None),
    ],
)
def test_a_foreign_base_model_is_named_or_asked_for(base, flags, expected, push, tmp_path):
    run_of(tmp_path / "logs", tmp_path / "store", base)
    shown = push("--dry_run", tmp_path / "dry", *flags)
    head, body = card_of(tmp_path / "dry")
    assert head.get("base_model") == (flags[1] if flags else expected)
    assert ("started from /home/me/smol; if it is on the hub" in shown) == (
        base == "/home/me/smol" and not flags
    )
    assert head["datasets"] == ["HuggingFaceTB/smoltalk2"]  # not "unused", no local path
    assert "language" not in head and "/home/me" not in body  # text that nobody described


def test_a_card_in_the_checkpoint_is_used(push, model, tmp_path):
    card = model[0] / "README.md"
    card.write_text("# My words\n", encoding="utf-8")
    try:
        assert f"the card is {card}" in push("--dry_run", tmp_path / "dry")
        assert (tmp_path / "dry" / "README.md").read_text(encoding="utf-8") == "# My words\n"
    finally:
        card.unlink()


def test_mistakes_are_told_in_a_sentence(hub, model, tmp_path, capsys, monkeypatch):
    folder, file = model
    other = shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("state"))
    (other / "tokenizer.json").unlink()
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    names = ["config.json", "model.safetensors"]
    sums = hash_files(damaged, names, "sha256")
    content = {"hash": "sha256", "files": {**sums, "config.json": "0" * 64}}
    (damaged / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    another = shutil.copytree(folder, tmp_path / "another")  # as after further training
    weights = load_file(another / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, another / "model.safetensors", metadata={"format": "pt"})
    (another / "manifest.json").unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "not.gguf").write_bytes(b"no")
    good = ("--checkpoint", folder, "--repo", REPO)
    for flags, words in (
        (("--checkpoint", tmp_path / "none", "--repo", REPO), "none does not exist"),
        (("--checkpoint", file, "--repo", REPO), "is a file; give a checkpoint folder"),
        (("--checkpoint", tmp_path / "full", "--repo", REPO), "is not a checkpoint"),
        (("--checkpoint", other, "--repo", REPO), "has no tokenizer.json"),
        (("--checkpoint", damaged, "--repo", REPO), "is damaged (config.json has changed)"),
        (("--checkpoint", another, "--repo", REPO, "--gguf", file), "was not exported from"),
        ((*good, "--gguf", tmp_path / "not.gguf"), "is not a GGUF file"),
        ((*good, "--gguf", folder / "config.json"), "is not a .gguf file"),
        ((*good, "--gguf", file, file), "names two files"),
        ((*good, "--dry_run", tmp_path / "full"), "exists and is not empty"),
        ((*good, "--license", "My License"), "is not a license id"),
        ((*good, "--language", "English"), "is not a language code"),
        ((*good[:2], "--repo", "stranger/tiny"), "may not write to stranger/tiny"),
        *(
            ((*good[:2], "--repo", repo), "is not a repository name; give owner/name")
            for repo in ("tiny", "a/b/c", "a b/c", "a/b--c", "a/.b", "https://huggingface.co/a/b")
        ),
    ):
        assert words in complaint_of(push_to_hub.main, flags, capsys, monkeypatch), flags
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused = complaint_of(push_to_hub.main, good, capsys, monkeypatch)
    assert "the hub refused the token" in refused
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    missing = complaint_of(push_to_hub.main, good, capsys, monkeypatch)
    assert "there is no Hugging Face token; run `hf auth login`" in missing
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in complaint_of(push_to_hub.main, good, capsys, monkeypatch)
    assert not hub.repos

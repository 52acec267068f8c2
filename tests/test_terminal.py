"""Chat in the terminal: commands, history, Ctrl-C and Ctrl-D, with real tiny models."""

import argparse
import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import ROOT, complaint_of
from safetensors.torch import load_file, save_file
from scripted import scripted_model

from data.chat.conversations import read_conversations
from data.chat.rendering import IM_END, Chat
from inference import terminal
from inference.chat_session import ChatSession
from inference.terminal import COMMANDS, Conversation, edit_lines, run_conversation
from scripts import chat as chat_script

REPLY = "The quick brown fox jumps over a lazy dog."
FLAGS = ["--no_tools", "--temperature", "0", "--max_new_tokens", "1800"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint that replies REPLY to everything."""
    folder = tmp_path_factory.mktemp("scripted")
    scripted_model(folder, REPLY)
    return folder


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """A checkpoint whose reply begins again at its end."""
    folder = tmp_path_factory.mktemp("endless")
    chat = scripted_model(folder, REPLY)
    weights = load_file(folder / "model.safetensors")
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    stop = chat.ids[IM_END]
    last = int(head[stop].argmax())
    before = int(embedding[chat.prompt([{"role": "user", "content": "x"}])[-1]].argmax())
    first = int(head[:, before].argmax())
    head[stop, last], head[first, last] = 0.0, 5.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _take_terminal() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # pytest in the background ignores it
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A command on a pseudo-terminal, as its session's controlling terminal."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", **env},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.text = ""

    def type(self, keys: str) -> None:
        """Type keys; later until() calls look at the output from here on."""
        self.text = ""
        os.write(self.master, keys.encode())

    def interrupt_at_prompt(self) -> None:
        """Type half a line and Ctrl-C.

        CPython's input() notices a signal only while it waits in select(), shortly after the echo.
        """
        self.type("half a line")
        self.until("half a line$")
        time.sleep(0.5)
        self.type("\x03")

    def until(self, pattern: str, seconds: float = 60.0) -> str:
        """Read until the output, without colours, has the pattern, and return it."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert select.select([self.master], [], [], end - time.monotonic())[0], self.text
            try:
                data = os.read(self.master, 1 << 16)
            except OSError:  # EIO: the process has ended
                data = b""
            assert data, f"ended without {pattern!r}: {self.text}"
            self.text += data.decode(errors="replace")
            self.text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text).replace("\r\n", "\n")
        return self.text

    def end(self) -> int:
        """Wait for the end of the process; return its status."""
        status = self.process.wait(30)
        os.close(self.master)
        return status

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def chat(model: Path, state: Path, *flags: str) -> Terminal:
    command = [sys.executable, "-m", "scripts.chat", flags[0] if flags else "--model", str(model)]
    return Terminal([*command, *FLAGS, *flags[1:]], {"XDG_STATE_HOME": str(state)})


def test_help_and_ctrl_c_on_a_terminal(endless, tmp_path):
    with chat(endless, tmp_path / "state") as typed:
        typed.until(r"/help lists the commands\n(?s:.*)> $")
        typed.type("/help\n")
        shown = typed.until(r"Ctrl-C .*\n> $")
        assert all(re.search(rf"^{re.escape(name)} +\w", shown, re.MULTILINE) for name in COMMANDS)
        typed.type("/etc/hosts is what?\n")
        shown = typed.until(r"\n> $")
        assert "[note] there is no command /etc/hosts; the commands are /help, /reset" in shown
        typed.type("hello\n")
        typed.until(rf"hello\n(?s:.*){REPLY}{REPLY}")
        began = time.monotonic()
        typed.type("\x03")
        typed.until(r"\[stopped; the turn is discarded; /retry asks again\]\n> $", 20)
        assert time.monotonic() - began < 10
        typed.type(f"/save {tmp_path}/talk.jsonl\n")
        assert "[note] the conversation has no reply to save" in typed.until(r"\n> $")
        typed.type("/retry\n")
        typed.until(rf"{REPLY}{REPLY}")
        typed.type("\x03")
        typed.until(r"\[stopped.*\n> $", 20)
        typed.interrupt_at_prompt()
        typed.until(r"\nCtrl-C again, Ctrl-D or /quit ends the chat\n> $")
        typed.type("/undo\n")  # another line in between: the next Ctrl-C is the first one again
        assert "[note] the conversation has no turn yet" in typed.until(r"\n> $")
        typed.interrupt_at_prompt()
        typed.until(r"\nCtrl-C again.*\n> $")
        typed.interrupt_at_prompt()
        assert typed.end() == 0 and "Traceback" not in typed.text
    history = tmp_path / "state" / "nanollama" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    lines = history.read_text().splitlines()
    assert lines[:3] == ["/help", "/etc/hosts is what?", "hello"] and lines[-1] == "/undo"


def test_history_of_an_earlier_chat_and_ctrl_d(folder, tmp_path):
    history = tmp_path / "state" / "nanollama" / "chat_history"
    history.parent.mkdir(parents=True)
    history.write_text("What is 2 + 2?\n")
    with chat(folder, tmp_path / "state", "--checkpoint") as typed:
        typed.until(r"> $")
        typed.type("\x10\x02\x7f3\n")  # the line before, one character back, another one: 2 + 3?
        assert f"\n{REPLY}\n" in typed.until(rf"{REPLY}\n(?s:.*)> $")
        typed.type(f"/save {tmp_path}/talk.jsonl\n")
        typed.until(r"written to .*\n> $")
        typed.type("\x04")
        assert typed.end() == 0
    [line] = (tmp_path / "talk.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "messages": [
            {"role": "user", "content": "What is 2 + 3?"},
            {"role": "assistant", "content": REPLY},
        ]
    }
    assert history.read_text().splitlines()[:2] == ["What is 2 + 2?", "What is 2 + 3?"]


def test_without_a_writable_home_or_readline_a_chat_still_works(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with chat(folder, tmp_path / "file") as typed:  # a file in place of the state folder
        typed.until(r"> $")
        typed.type("hello\n")
        typed.until(rf"{REPLY}\n(?s:.*)> $")
        typed.type("/quit\n")
        assert typed.end() == 0 and "Error" not in typed.text
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "readline", None)
    edit_lines(tmp_path / "history")()
    assert not (tmp_path / "history").exists()


# commands


class Replies:
    """A session of the scripted model's chat format, whose replies the test gives in advance."""

    def __init__(self, folder: Path):
        self.chat, self.seeds = Chat.from_folder(folder), list[int]()
        self.args = argparse.Namespace(seed=7)
        self.texts: list[str] = []
        self.session = ChatSession(self.chat, self.generate, "Be brief.")
        self.conversation = Conversation(self.session, self.args)

    def generate(self, prompt: list[int]):
        self.seeds.append(self.args.seed)
        text = self.texts.pop(0)
        if text == "error":
            raise ValueError("the context is full")
        if text == "ctrl-c":
            yield from self.chat.tokenizer.encode("It", add_special_tokens=False).ids
            raise KeyboardInterrupt
        yield from self.chat.tokenizer.encode(text, add_special_tokens=False).ids
        yield self.chat.ids[IM_END]

    def take(self, line: str, *replies: str) -> bool:
        self.texts += replies
        return self.conversation.take(line)

    @property
    def messages(self) -> list[str]:
        return [message["content"] for message in self.session.messages]


@pytest.fixture
def replies(folder) -> Replies:
    return Replies(folder)


def test_undo_retry_and_reset(replies, capsys):
    assert replies.take("one", "It is") and replies.take("two", "four.")
    assert replies.take("/retry", "It")
    assert replies.messages == ["Be brief.", "one", "It is", "two", "It"]
    assert replies.seeds == [7, 7, 8]
    capsys.readouterr()
    assert replies.take("/undo")
    assert capsys.readouterr().out == "removed: two\n"
    assert replies.messages == ["Be brief.", "one", "It is"]
    assert replies.take("/retry", "four.") and replies.messages[1:] == ["one", "four."]
    assert replies.take("/reset") and replies.messages == ["Be brief."]
    for command in ("/undo", "/retry"):
        with pytest.raises(ValueError, match="the conversation has no turn yet"):
            replies.take(command)
    assert not replies.take("/quit") and not replies.take(" /exit ")


@pytest.mark.parametrize(
    ("failure", "error"), [("ctrl-c", KeyboardInterrupt), ("error", ValueError)]
)
def test_a_discarded_turn_can_be_asked_again_and_a_failed_retry_keeps_the_answer(
    replies, failure, error
):
    with pytest.raises(error):
        replies.take("one", failure)
    assert replies.messages == ["Be brief."]
    assert replies.take("/retry", "four.") and replies.messages[1:] == ["one", "four."]
    with pytest.raises(error):
        replies.take("/retry", failure)
    assert replies.messages[1:] == ["one", "four."]
    assert replies.take("/retry", "It") and replies.messages[1:] == ["one", "It"]
    with pytest.raises(error):
        replies.take("two", failure)
    assert replies.take("/undo") and replies.messages == ["Be brief."]  # the last answered turn


def test_two_slashes_send_one_and_an_unknown_command_is_not_sent(replies):
    assert replies.take("  //etc/hosts", "It is")
    assert replies.messages[1].strip() == "/etc/hosts"
    for line in ("/etc/hosts", "/", "/savefile x", "/Help"):
        with pytest.raises(ValueError, match=r"there is no command .*/help, /reset.*type two"):
            replies.take(line)
    assert len(replies.messages) == 3


def test_save_writes_a_row_that_sft_reads_and_overwrites_nothing(replies, folder, tmp_path):
    with pytest.raises(ValueError, match="no reply to save"):
        replies.take(f"/save {tmp_path}/a.jsonl")
    replies.take("öne", REPLY)
    replies.session.tools = [{"type": "function", "function": {"name": "f"}}]
    assert replies.take(f"/save {tmp_path}/a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    for name, words in (
        ("a.jsonl", "exists; give the name of a new file"),
        ("a.json", "must end in .jsonl"),
        ("none/a.jsonl", "cannot be written"),
    ):
        with pytest.raises(ValueError, match=words):
            replies.take(f"/save {tmp_path}/{name}")
    with pytest.raises(ValueError, match="needs the name of a file"):
        replies.take("/save ")
    assert (tmp_path / "a.jsonl").read_bytes() == before
    [row] = read_conversations(str(tmp_path / "a.jsonl"), "messages")
    assert [message["content"] for message in row["messages"]] == ["Be brief.", "öne", REPLY]
    assert row["tools"] == replies.session.tools and "öne".encode() in before


def test_prompts_may_be_commands_and_a_wrong_one_ends_them(replies, capsys):
    replies.texts = ["It is", "four."]
    run_conversation(replies.session, replies.args, ["one", "/reset", "two", "/quit", "three"])
    assert replies.messages == ["Be brief.", "two", "four."]
    assert capsys.readouterr().out.splitlines() == [
        "> one",
        "It is",
        "> /reset",
        "new conversation",
        "> two",
        "four.",
        "> /quit",
    ]
    with pytest.raises(ValueError, match="there is no command /what"):
        run_conversation(replies.session, replies.args, ["/what"])


def test_ctrl_c_ends_given_prompts(replies):
    replies.texts = ["ctrl-c", "four."]
    with pytest.raises(KeyboardInterrupt):
        run_conversation(replies.session, replies.args, ["one", "two"])
    assert replies.messages == ["Be brief."]


def test_model_and_checkpoint_are_the_same_flag(folder, capsys, monkeypatch):
    for flag in ("--model", "--checkpoint"):
        monkeypatch.setattr(sys, "argv", ["x", flag, str(folder), *FLAGS, "--prompt", "hello"])
        chat_script.main()
        assert capsys.readouterr().out.endswith(f"> hello\n{REPLY}\n")
    wrong = ["--checkpoint", folder, *FLAGS, "--prompt", "/what"]
    assert "there is no command /what" in complaint_of(chat_script.main, wrong, capsys, monkeypatch)


def test_the_history_file_is_in_the_state_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    expected = tmp_path / ".local" / "state" / "nanollama" / "chat_history"
    assert chat_script.history_file() == expected
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert chat_script.history_file() is None


def test_long_and_strange_texts_are_shown_in_one_line():
    assert terminal.shown("a\n\x1b[2J b" + "x" * 80) == "a \ufffd[2J b" + "x" * 52 + "..."

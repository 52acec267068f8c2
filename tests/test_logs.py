"""Logs of a run: metrics, events, heartbeat, alerts, comparisons of runs."""

import json
import math
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import forked
import pytest
import yaml
from conftest import ROOT
from sinks import FakeWandb

from evals.report.runs import open_runs, table
from files import read_lines
from scripts.experiment import main as compare
from training.config import load, to_dict
from training.logger import Log, LogConfig, append_event
from training.ops import alerts
from training.ops.alerts import AlertConfig, Alerts, EmailConfig

ROW = {
    "step": 1,
    "phase": "p",
    "loss": 1.0,
    "lr": 0.1,
    "grad_norm": 2.0,
    "tokens_per_s": 3.0,
    "end": 2,
}


def row(step: int, **more) -> dict:
    return {**ROW, "step": step, "tokens": 100 * step, "step_s": 0.5, **more}


# metrics and events


def test_the_log_is_valid_json_and_forgets_what_a_resume_or_a_roll_back_replaces(tmp_path):
    log = Log(tmp_path, LogConfig(), True, {})
    log.open(0, 3, "p")
    for step in (1, 2, 3):
        log.metrics(row(step, loss=math.nan if step == 2 else 1.0))
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a line that a kill cut off
    with Log(tmp_path, LogConfig(), True, {}) as again:
        again.open(2, 5, "p")
        for step in (3, 4, 5):
            again.metrics(row(step, loss=7.0))
        again.open(3, 5, "p")  # as after a rollback
        again.metrics(row(4, loss=8.0))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[1]["loss"] == "nan"
    assert [row["loss"] for row in rows[2:]] == [7.0, 8.0]


def test_other_ranks_write_nothing(tmp_path):
    with Log(
        tmp_path / "other", LogConfig(wandb_project="p", tensorboard=True), False, {}
    ) as silent:
        silent.open(0, 1, "p")
        silent.metrics(ROW)
        silent.event("skipped", "a step")
    assert not (tmp_path / "other").exists()


def test_an_event_is_a_line_in_both_files_and_what_was_written_stays(tmp_path, capsys):
    log = Log(tmp_path / "run", LogConfig(), True, {"run": "r", "phase": "one"})
    log.event("begun", "r one: starts from scratch", step=0)
    before = [
        (tmp_path / "run" / name).read_bytes() for name in ("events.jsonl", "training_log.md")
    ]
    log.open(4, 9, "one")
    log.event("skipped", batch_index=7, problem="loss nan", loss=math.nan)
    append_event(tmp_path / "run", "gate", "decision: go", step=10_000, outcome="go", of=Path("x"))
    after = [(tmp_path / "run" / name).read_bytes() for name in ("events.jsonl", "training_log.md")]
    assert all(new.startswith(old) for new, old in zip(after, before, strict=True))
    one, two, three = read_lines(tmp_path / "run" / "events.jsonl")
    assert (
        one["event"] == "begun"
        and one["phase"] == "one"
        and one["step"] == 0
        and one["time"].endswith("+00:00")
    )
    assert (
        (two["step"], two["batch_index"], two["loss"]) == (4, 7, "nan")
        and three["outcome"] == "go"
        and three["of"] == "x"
    )
    text = (tmp_path / "run" / "training_log.md").read_text().splitlines()
    assert text[0] == "# Training log of run" and text[2].endswith(
        "UTC · step 0 · **begun**: r one: starts from scratch"
    )
    assert (
        "step 4 · **skipped**: phase one, batch_index 7, problem loss nan" in text[3]
        and "step 10,000 · **gate**" in text[4]
    )
    assert "skipped at step 4: phase one, batch_index 7" in capsys.readouterr().out


def test_killed_at_any_moment_the_event_files_stay_whole(tmp_path):
    code = f"""
from pathlib import Path
from training.logger import append_event
n = 0
while True:
    append_event(Path({str(tmp_path)!r}), "e", "word " * 50, step=n)
    n += 1
"""
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
            size = (
                (tmp_path / "events.jsonl").stat().st_size
                if (tmp_path / "events.jsonl").exists()
                else 0
            )
            until(
                lambda: (
                    (tmp_path / "events.jsonl").exists()
                    and (tmp_path / "events.jsonl").stat().st_size > size + 2000
                )
            )
            process.send_signal(signal.SIGKILL)
        for name in ("events.jsonl", "training_log.md"):
            with open(tmp_path / name, "ab") as file:
                file.write(b'{"torn')  # the worst result of a kill during a write
    append_event(tmp_path, "last", "after all that")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    # The kill itself may tear a line too, between two pages of a write; the torn text then ends it.
    assert sum(line.endswith('{"torn') for line in lines) == 3
    assert len(read_lines(tmp_path / "events.jsonl")) == len(lines) - 3
    assert read_lines(tmp_path / "events.jsonl")[-1]["event"] == "last"
    assert (
        (tmp_path / "training_log.md")
        .read_text()
        .splitlines()[-1]
        .endswith("**last**: after all that")
    )


def test_an_exception_in_training_is_an_event_and_ends_the_heartbeat(tmp_path):
    with pytest.raises(RuntimeError), Log(tmp_path, LogConfig(), True, {"run": "r"}) as log:
        log.open(0, 3, "p")
        log.metrics(row(1))
        raise RuntimeError("a rank\nis gone")
    [event] = read_lines(tmp_path / "events.jsonl")
    assert (
        event["event"] == "failed"
        and event["step"] == 1
        and "RuntimeError: a rank is gone" in event["text"]
    )
    assert json.loads((tmp_path / "heartbeat").read_text())["status"] == "failed"
    with pytest.raises(RuntimeError), Log(tmp_path / "mistake", LogConfig(), True, {}):
        raise RuntimeError("before training began")
    assert not (tmp_path / "mistake").exists()


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


# alerts


def until(true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def serve(server):
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture
def slack():
    """A local webhook that records posts and answers with `status` after `wait` seconds."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.posts.append(
                (self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            )
            time.sleep(self.server.wait)
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with serve(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        server.posts, server.wait, server.status = [], 0.0, 200
        server.url = f"http://127.0.0.1:{server.server_port}/services/T0/hush"
        yield server
        server.shutdown()


@pytest.fixture
def smtp():
    """A local SMTP server without STARTTLS that records what it receives."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            say = lambda text: self.wfile.write(f"{text}\r\n".encode())  # noqa: E731
            say("220 stub")
            while line := self.rfile.readline().decode().strip().upper():
                self.server.lines.append(line)
                if line.startswith("EHLO"):
                    say("250-stub\r\n250 AUTH PLAIN")
                elif line.startswith("AUTH"):
                    say("235 fine")
                elif line == "DATA":
                    say("354 go on")
                    while (text := self.rfile.readline().decode().rstrip("\r\n")) != ".":
                        self.server.mail.append(text)
                    say("250 fine")
                else:
                    say("221 bye" if line == "QUIT" else "250 fine")

    with serve(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as server:
        server.lines, server.mail = [], []
        yield server
        server.shutdown()


def failures(folder: Path) -> list[dict]:
    return [
        event for event in read_lines(folder / "events.jsonl") if event["event"] == "alert_failed"
    ]


def test_slack_gets_what_happened_and_only_what_was_asked_for(tmp_path, slack):
    config = LogConfig(alerts=AlertConfig(slack_webhook="HOOK"))
    with Log(tmp_path, config, True, {"run": "r"}, {"HOOK": slack.url}) as log:
        log.open(3, 9, "p")
        log.event("skipped", "not told")
        log.event("rollback", "back to <3> & on")
        log.event("rollback", "again, a moment later")
    [(path, post)] = slack.posts
    assert path == "/services/T0/hush"
    assert (
        post["text"].startswith("*r: rollback at step 3*\nback to &lt;3&gt; &amp; on\n")
        and str(tmp_path) in post["text"]
    )
    assert not failures(tmp_path) and "hush" not in (tmp_path / "events.jsonl").read_text()


def test_an_alert_that_fails_or_hangs_is_an_event_and_no_step_waits(
    tmp_path, slack, monkeypatch, capfd
):
    monkeypatch.setattr(alerts, "TIMEOUT", 0.6)
    for number, (status, wait, url) in enumerate(
        [(500, 0, slack.url), (200, 5, slack.url), (200, 0, "http://127.0.0.1:9/hush")]
    ):
        slack.status, slack.wait = status, wait
        config = LogConfig(alerts=AlertConfig(slack_webhook="HOOK", quiet_s=0))
        with Log(tmp_path / str(number), config, True, {}, {"HOOK": url}) as log:
            log.open(0, 9, "p")
            began = time.monotonic()
            log.event("rollback", "x")
            assert time.monotonic() - began < 0.5
        [event] = failures(tmp_path / str(number))
        assert event["channel"] == "slack" and "hush" not in json.dumps(event)
        assert ["HTTPError: HTTP Error 500", "timed out", "refused"][number] in event["text"]
    assert "Traceback" not in capfd.readouterr().err


def test_flush_does_not_wait_for_ever(tmp_path):
    failed = []
    sender = Alerts(AlertConfig(), {}, lambda channel, error: failed.append((channel, error)))
    sender.channels["hung"] = lambda title, text: time.sleep(30)
    sender.send("failed", "t", "x")
    sender.flush(0.1)
    assert failed == [("hung", "not sent within 0.1 s")]


def test_email_goes_by_smtp_with_a_login(tmp_path, smtp):
    email = EmailConfig(
        "me@x.org, you@x.org",
        "127.0.0.1",
        smtp.server_address[1],
        user="u@x.org",
        password="PASS",
        starttls=False,
    )
    failed = []
    sender = Alerts(AlertConfig(email=email), {"PASS": "hush"}, lambda *error: failed.append(error))
    sender.send("failed", "r: failed\nat step 3", "why: loss nan")
    sender.flush()
    assert not failed
    assert "MAIL FROM:<U@X.ORG>" in [line.split(" SIZE")[0] for line in smtp.lines]
    assert sum(line.startswith("RCPT TO:<") for line in smtp.lines) == 2
    assert any(line.startswith("AUTH PLAIN") for line in smtp.lines)
    assert {"Subject: r: failed at step 3", "From: u@x.org", "why: loss nan"} <= set(smtp.mail)


def test_a_password_is_not_sent_to_a_server_without_tls(tmp_path, smtp):
    email = EmailConfig("me@x.org", "127.0.0.1", smtp.server_address[1], user="u", password="PASS")
    failed = []
    sender = Alerts(AlertConfig(email=email), {"PASS": "hush"}, lambda *error: failed.append(error))
    sender.send("failed", "t", "x")
    sender.flush()
    assert failed[0][0] == "email" and "STARTTLS" in failed[0][1]
    assert not smtp.mail and not any("AUTH" in line for line in smtp.lines)


def test_a_command_reads_the_alert(tmp_path, monkeypatch):
    failed = []

    def tell(command: str) -> None:
        sender = Alerts(AlertConfig(command=command), {}, lambda *error: failed.append(error))
        sender.send("failed", "title", "text")
        sender.flush()

    tell(f"cat > {tmp_path}/told")
    assert (tmp_path / "told").read_text() == "title\ntext\n" and not failed
    tell("exit 4")
    assert failed.pop() == ("command", "OSError: the command ended with status 4")
    monkeypatch.setattr(alerts, "TIMEOUT", 0.2)
    tell(f"sleep 1; touch {tmp_path}/late")
    assert "took more than 0.2 s" in failed.pop()[1]
    time.sleep(1)
    assert not (tmp_path / "late").exists()


def test_wandb_raises_the_alert_of_its_run(tmp_path, wandb):
    config = LogConfig(wandb_project="p", alerts=AlertConfig(wandb=True, events=("skipped",)))
    with Log(tmp_path, config, True, {"run": "r"}) as log:
        log.open(0, 9, "p")
        log.event("skipped", "why", step=2)
    assert wandb.alerts == ["r: skipped at step 2"] and wandb.ended == [0]


def test_alerts_are_settings_and_secrets_are_not(tmp_path, capfd):
    text = (
        "log:\n  alerts:\n    events: [failed]\n    slack_webhook: HOOK\n"
        "    email: {to: a@x.org, host: h, user: u, password: PW}"
    )
    (tmp_path / "c.yaml").write_text(text)
    run = load(tmp_path / "c.yaml")
    assert (
        run.log.alerts.email.port == 587
        and run.log.alerts.events == ("failed",)
        and run.log.alerts.secrets == ("HOOK", "PW")
    )
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(to_dict(run)))
    assert load(tmp_path / "again.yaml") == run
    capfd.readouterr()
    channels = Log(tmp_path / "l", run.log, True, {}, {"HOOK": "https://x"}).alerts.channels
    assert capfd.readouterr().out == "alerts: email off (set PW)\n" and list(channels) == ["slack"]
    channels = Log(
        tmp_path / "l", run.log, True, {}, {"HOOK": "https://x", "PW": "p"}
    ).alerts.channels
    assert capfd.readouterr().out == "" and list(channels) == ["slack", "email"]
    for wrong, sentence in [
        ("slack_webhook: https://hooks.example/T0/hush", "not the secret itself"),
        ("email: {to: a@x.org}", "log.alerts.email lacks host"),
        ("email: {to: a@x.org, host: h, user: u}", "needs both user and password"),
        ("wandb: true", "set log.wandb_project"),
    ]:
        (tmp_path / "c.yaml").write_text(f"log: {{alerts: {{{wrong}}}}}")
        with pytest.raises(ValueError, match=sentence):
            load(tmp_path / "c.yaml")


def test_an_email_whose_texts_are_environment_variables(tmp_path, smtp, capfd):
    email = {
        "to": "$ALERT_EMAIL",
        "host": "$SMTP_HOST",
        "port": smtp.server_address[1],
        "starttls": False,
    }
    config = LogConfig(alerts=AlertConfig(email=EmailConfig(**email)))
    assert config.alerts.secrets == ("ALERT_EMAIL", "SMTP_HOST")
    with Log(tmp_path / "off", config, True, {"run": "r"}) as log:
        log.open(0, 9, "p")
        log.event("rollback", "not sent")
    assert (
        "alerts: email off (set ALERT_EMAIL, SMTP_HOST)" in capfd.readouterr().out
        and not smtp.lines
    )
    values = {"ALERT_EMAIL": "me@x.org", "SMTP_HOST": "127.0.0.1"}
    with Log(tmp_path / "on", config, True, {"run": "r"}, values) as log:
        log.open(0, 9, "p")
        log.event("rollback", "sent")
    assert "RCPT TO:<ME@X.ORG>" in smtp.lines and "Subject: r: rollback at step 0" in smtp.mail


# heartbeat


def test_the_heartbeat_is_renewed_at_most_once_a_second_and_says_how_it_ended(
    tmp_path, monkeypatch
):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    read = lambda: json.loads((tmp_path / "heartbeat").read_text())  # noqa: E731
    log = Log(tmp_path, LogConfig(), True, {})
    log.open(0, 9, "p")
    for step, when in ((1, 0.5), (2, 0.9)):
        clock[0] = when
        log.metrics(row(step))
    assert read()["step"] == 0 and read()["status"] == "running" and read()["pid"] == os.getpid()
    clock[0] = 1.1
    log.metrics(row(3))
    assert read()["step"] == 3 and read()["phase"] == "p"
    log.event("stopped", "by a signal")
    log.close()
    assert read()["status"] == "stopped"


def test_a_watcher_tells_of_a_run_that_is_killed_and_of_its_return(tmp_path):
    (tmp_path / "one.config.yaml").write_text("steps: 5\n")
    log = Log(tmp_path, LogConfig(), True, {})
    log.open(7, 9, "p")
    command = [
        sys.executable,
        "-m",
        "scripts.watch",
        str(tmp_path),
        "--stale",
        "0.3",
        "--alert",
        f"cat >> {tmp_path}/told",
    ]
    alert_text = lambda: (tmp_path / "told").read_text() if (tmp_path / "told").exists() else ""  # noqa: E731
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            until(lambda: "stuck" in alert_text(), 20)
            time.sleep(0.5)
            log.beat(8, force=True)
            until(lambda: "recovered" in alert_text())
            log.close()
            time.sleep(0.5)
        finally:
            process.kill()  # background jobs of a shell ignore SIGINT
        output, _ = process.communicate()
    kinds = [event["event"] for event in read_lines(tmp_path / "events.jsonl")]
    assert (
        kinds[:2] == ["stuck", "recovered"]
        and kinds.count("stuck") == alert_text().count("no step for 0.3 s") <= 2
    )
    assert (
        f"step 7 of p, process {os.getpid()}" in alert_text()
        and "watching" in output
        and "Traceback" not in output
    )


# comparisons


def make_run(folder: Path, offset: float, events: list[dict]) -> Path:
    folder.mkdir(parents=True)
    rows = [
        row(i, phase="a" if i < 60 else "b", loss=offset + 5 / i, end=100) for i in range(1, 101)
    ]
    for i, loss in ((50, 2.5), (59, 2.0), (100, 3.0)):
        rows[i - 1] |= {
            "val/loss": loss + offset,
            "val/wiki/loss": loss,
            "val/wiki/bits_per_byte": loss / 2,
        }
    rows[9]["loss"] = "nan"
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 101, "lo'
    )
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_runs_are_compared_in_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    skip = {"event": "skipped", "phase": "a", "step": 10, "batch_index": 9}
    rest = [
        {"event": "rollback", "step": 8},
        {"event": "gate", "step": 59, "outcome": "go"},
        {"event": "failed", "step": 999},
    ]
    one = make_run(tmp_path / "one", 0.0, [])
    two = make_run(tmp_path / "two", 1.0, [skip, skip, {**skip, "batch_index": 12}, *rest])
    monkeypatch.setattr(
        sys,
        "argv",
        ["x", "--compare", str(one), str(two), "--output", str(tmp_path / "out" / "v1.2")],
    )
    compare()
    text = (tmp_path / "out" / "v1.2.md").read_text()
    assert text in capsys.readouterr().out
    figures = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
    }
    assert (
        figures[""] == ["one", "two"]
        and figures["tokens"] == ["10,000"] * 2
        and figures["last step, phase"] == ["100, b"] * 2
    )
    assert figures["validation loss, last"] == ["3.000", "4.000"]
    assert figures["validation loss, best"] == ["2.000 (step 59, a)", "3.000 (step 59, a)"]
    assert (
        figures["bits per byte, wiki"] == ["1.500"] * 2 and figures["tokens/s, median"] == ["3"] * 2
    )
    assert figures["hours in steps"] == ["0.01"] * 2  # 100 steps of 0.5 s
    assert figures["skipped updates"] == ["0", "2"] and figures["roll-backs"] == ["0", "1"]
    assert (tmp_path / "out" / "v1.2.png").read_bytes().startswith(b"\x89PNG")


def test_smoothing_keeps_phases_apart_and_knows_no_spikes(tmp_path):
    folder = make_run(tmp_path / "one", 0.0, [])
    rows = read_lines(folder / "metrics.jsonl")
    for i, line in enumerate(rows):
        line["loss"] = {9: "inf", 30: 1e6}.get(i, 2.0 if i < 59 else 4.0)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    [run] = open_runs([folder])
    assert run.smooth("loss").tolist() == [2.0] * 59 + [4.0] * 41
    again = make_run(tmp_path / "more" / "one", 0.0, [])
    assert str(again) in table(open_runs([folder, again])).splitlines()[0]


def test_a_run_alone_is_plotted_beside_its_metrics(tmp_path):
    folder = make_run(tmp_path / "one", 0.0, [])
    done = forked.run([sys.executable, "-m", "scripts.plot_run", str(folder)])
    assert done.returncode == 0 and str(folder / "loss.png") in done.stdout, done.stderr
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG") and (
        folder / "loss.png"
    ).stat().st_size > 20_000

"""Alerts by Slack webhook, email, a shell command or Weights & Biases.

A thread with a time limit sends each alert, so training never waits, and failures do not stop it.
Secrets are not settings: a setting names the environment variable that holds one. A channel is off
unless all its variables are set.
"""

import json
import os
import signal
import smtplib
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from email.message import EmailMessage
from typing import Annotated, Any

from ranges import NonEmptyText, NonNegativeFloat, at_least, check_fields

TIMEOUT = 10.0  # seconds that a server or a command may take
Channel = Callable[[str, str], None]  # (title, text) -> None, or raises


@dataclass(frozen=True)
class EmailConfig:
    """SMTP settings. Text of the form $NAME is read from an environment variable."""

    to: NonEmptyText  # one address, or several separated by commas
    host: NonEmptyText  # name of the SMTP server
    port: Annotated[int, at_least(1, maximum=65_535)] = 587  # port; 465 for implicit TLS
    sender: str | None = None  # default: the user, else the first recipient
    user: str | None = None  # login at the SMTP server; default: none
    password: str | None = None  # the NAME of the environment variable that holds it
    starttls: bool = True  # encrypt the connection with STARTTLS

    def __post_init__(self) -> None:
        check_fields(self, "log.alerts.email")
        if (self.user is None) != (self.password is None):
            raise ValueError(
                "log.alerts.email needs both user and password (the name of an environment "
                "variable), or neither"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the environment variables that this channel needs."""
        texts = (self.to, self.host, self.sender, self.user)
        named = [text[1:] for text in texts if text and text.startswith("$")]
        return (*named, self.password) if self.password else (*named,)

    def filled(self, values: Mapping[str, str]) -> "EmailConfig":
        """Return a copy with $NAME replaced by the values of environment variables."""
        texts = {name: getattr(self, name) for name in ("to", "host", "sender", "user")}
        known: dict[str, Any] = {
            name: values[text[1:]] for name, text in texts.items() if text and text.startswith("$")
        }
        return replace(self, **known)


@dataclass(frozen=True)
class AlertConfig:
    """Kinds of events that send alerts, and the channels."""

    # Kinds of events that send an alert.
    events: tuple[str, ...] = ("startup", "gate", "rollback", "failed", "stuck", "ended")
    slack_webhook: str | None = None  # the NAME of the environment variable that holds the URL
    email: EmailConfig | None = None  # default: no email
    command: str | None = None  # shell command that reads title and text from standard input
    wandb: bool = False  # alerts of the W&B run; needs log.wandb_project
    quiet_s: NonNegativeFloat = 300.0  # minimum seconds between alerts of the same kind

    def __post_init__(self) -> None:
        check_fields(self, "log.alerts")
        for name in self.secrets:
            if not name.isidentifier():
                raise ValueError(
                    "log.alerts.slack_webhook and log.alerts.email.password take the name of an "
                    "environment variable, such as SLACK_WEBHOOK, not the secret itself: settings "
                    "are written into logs"
                )

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """Return channel -> names of the environment variables it needs."""
        slack = {"slack": (self.slack_webhook,)} if self.slack_webhook else {}
        return slack | ({"email": self.email.needs} if self.email else {})

    @property
    def secrets(self) -> tuple[str, ...]:
        """Names of the environment variables that the channels need."""
        return tuple(dict.fromkeys(name for names in self.needs.values() for name in names))

    def off(self, secrets: Mapping[str, str]) -> dict[str, str]:
        """Return the channels that are off, each with its missing variables."""
        missing = {
            channel: [name for name in names if not secrets.get(name)]
            for channel, names in self.needs.items()
        }
        return {channel: ", ".join(names) for channel, names in missing.items() if names}


class Alerts:
    """Sends alerts to every channel of a config.

    failed(channel, error) is called in the sending thread for each failure. secrets: values of the
    environment variables in config.secrets. off: channels whose variables are missing.
    """

    def __init__(
        self, config: AlertConfig, secrets: Mapping[str, str], failed: Callable[[str, str], None]
    ):
        self.config, self.failed, self.values = (
            config,
            failed,
            [value for value in secrets.values() if value],
        )
        self.threads: list[tuple[str, threading.Thread]] = []
        self.sent: dict[str, float] = {}
        self.channels: dict[str, Channel] = {}
        self.off = config.off(secrets)
        if config.slack_webhook and "slack" not in self.off:
            url = secrets[config.slack_webhook]
            if not url.startswith(("https://", "http://")):
                raise ValueError(
                    f"the environment variable {config.slack_webhook} must hold the URL of a "
                    "Slack webhook"
                )
            self.channels["slack"] = lambda title, text: send_slack(url, title, text)
        if config.email and "email" not in self.off:
            email = config.email.filled(secrets)
            password = secrets[email.password] if email.password else None
            self.channels["email"] = lambda title, text: send_email(email, password, title, text)
        if command := config.command:
            self.channels["command"] = lambda title, text: send_to_command(command, title, text)

    def send(self, kind: str, title: str, text: str) -> None:
        """Send to all channels unless `kind` is disabled or within quiet_s. Does not block."""
        now = time.monotonic()
        if (
            kind not in self.config.events
            or now - self.sent.get(kind, -float("inf")) < self.config.quiet_s
        ):
            return
        self.sent[kind] = now
        title = " ".join(title.split())
        for name, channel in self.channels.items():
            thread = threading.Thread(
                target=self._send, args=(name, channel, title, text), daemon=True
            )
            thread.start()
            self.threads.append((name, thread))

    def _send(self, name: str, channel: Channel, title: str, text: str) -> None:
        try:
            channel(title, text)
        except Exception as error:  # training continues
            text = f"{type(error).__name__}: {error}"
            for value in self.values:
                text = text.replace(value, "***")
            self.failed(name, text)

    def flush(self, seconds: float = 1.5 * TIMEOUT) -> None:
        """Wait up to `seconds` in total for alerts in progress."""
        end = time.monotonic() + seconds
        for name, thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                self.failed(name, f"not sent within {seconds:g} s")
        self.threads = []


def send_slack(url: str, title: str, text: str) -> None:
    """POST to a Slack webhook (https://api.slack.com/messaging/webhooks); OSError on failure."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    body = json.dumps({"text": f"*{title}*\n{plain}"}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT):
        pass


def send_email(config: EmailConfig, password: str | None, title: str, text: str) -> None:
    """Send a plain-text mail by SMTP; smtplib.SMTPException or OSError on failure."""
    message = EmailMessage()
    message["Subject"], message["To"] = title, config.to
    message["From"] = config.sender or config.user or config.to.split(",")[0]
    message.set_content(text)
    tls = ssl.create_default_context()
    if config.port == 465:
        server: smtplib.SMTP = smtplib.SMTP_SSL(
            config.host, config.port, timeout=TIMEOUT, context=tls
        )
    else:
        server = smtplib.SMTP(config.host, config.port, timeout=TIMEOUT)
    with server:
        if config.starttls and config.port != 465:
            server.starttls(context=tls)  # raises without TLS, so passwords are never sent in clear
        if config.user and password:
            server.login(config.user, password)
        server.send_message(message)


def send_to_command(command: str, title: str, text: str) -> None:
    """Run a shell command with title and text on standard input; OSError if it fails or hangs."""
    process = subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
        encoding="utf-8",
    )
    try:
        process.communicate(f"{title}\n{text}\n", timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the shell and its child processes
        process.wait()
        raise OSError(f"the command took more than {TIMEOUT:g} s") from None
    if process.returncode:
        raise OSError(f"the command ended with status {process.returncode}")

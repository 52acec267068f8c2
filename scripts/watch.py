"""Watch a run from another process; send an alert when it makes no progress (killed or hung).

python -m scripts.watch logs/quickstart --stale 600

Uses the alerts of the run's config (log.alerts) and --alert. On another machine with access to the
folder it also detects a host failure. It runs until interrupted, across phases and restarts.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

from cli import CommandParser, user_errors, within
from ranges import above
from training import setup
from training.config import load
from training.logger import append_event, open_alerts
from training.ops.alerts import Alerts


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "logs", type=Path, help="the folder that contains heartbeat and <phase>.config.yaml"
    )
    parser.add_argument(
        "--stale",
        type=within(float, above(0)),
        default=600,
        help="seconds without a step before an alert; more than validation and saving take",
    )
    parser.add_argument(
        "--alert",
        metavar="COMMAND",
        help="a shell command that reads the alert from standard input",
    )
    args = parser.parse_args()
    with user_errors():
        configs = sorted(args.logs.glob("*.config.yaml"), key=lambda path: path.stat().st_mtime)
        if not configs:
            raise ValueError(
                f"{args.logs} has no <phase>.config.yaml; give the log folder of a started run"
            )
        config = load(configs[-1]).log.alerts
        config = replace(
            config,
            events=("stuck", "recovered"),
            command=args.alert or config.command,
            quiet_s=0.0,
            wandb=False,
        )
        alerts = open_alerts(args.logs, config, setup.secrets(config.secrets))
        print(f"watching {args.logs / 'heartbeat'}; Ctrl-C stops it", flush=True)
        watch(args.logs, args.stale, alerts)


def watch(run: Path, stale: float, alerts: Alerts) -> None:
    """Log and alert whenever a running heartbeat is unchanged for `stale` seconds; never return.

    Uses this machine's clock only, since the run's clock may differ.
    """
    seen, since, stuck = "", time.monotonic(), False
    while True:
        text = (
            (run / "heartbeat").read_text(encoding="utf-8") if (run / "heartbeat").is_file() else ""
        )
        beat, was_stuck = json.loads(text or "{}"), stuck
        if text != seen:
            seen, since, stuck = text, time.monotonic(), False
        elif beat.get("status") == "running" and time.monotonic() - since >= stale:
            stuck = True
        if stuck != was_stuck:
            kind, text = (
                ("stuck", f"no step for {stale:g} s") if stuck else ("recovered", "steps again")
            )
            text += f"; step {beat.get('step')} of {beat.get('phase')}"
            text += f", process {beat.get('pid')} on {beat.get('host')}"
            append_event(run, kind, text, phase=beat.get("phase"), step=beat.get("step"))
            print(f"{kind}: {text}", flush=True)
            alerts.send(kind, f"{run.absolute().name}: {kind}", f"{text}\n{run.absolute()}")
            alerts.flush()
        time.sleep(min(5.0, stale / 10))


if __name__ == "__main__":
    main()

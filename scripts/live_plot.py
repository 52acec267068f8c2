"""Plot the loss of a run while it trains: a PNG file, and a browser page that shows it.

python -m scripts.live_plot --experiment_name speedrun

Draws training loss, validation loss and the run's target_loss against tokens into
logs/NAME/live.png whenever there are new steps. logs/NAME/live.html shows that file and reloads it;
it opens in a browser if this machine has a screen. Waits until the run starts, and ends with it.
"""

import os
import sys
import time
import webbrowser
from pathlib import Path

from cli import CommandParser, user_errors, within
from evals.report.runs import open_runs, plot_losses
from files import write_text
from ranges import above
from training.run_folder import in_use
from yaml_file import read_yaml_file

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<img id="curve" src="live.png" alt="loss against tokens" style="max-width: 100%">
<script>
setInterval(() => {{ document.getElementById("curve").src = "live.png?" + Date.now() }}, {ms})
</script>
"""


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--experiment_name", required=True, help="the run's name (run: NAME)")
    parser.add_argument("--logs", type=Path, default="logs", help="folder of all runs' logs")
    parser.add_argument(
        "--every", type=within(float, above(0)), default=5.0, help="seconds between updates"
    )
    parser.add_argument("--no_browser", action="store_true", help="only write the files")
    args = parser.parse_args()
    with user_errors():
        folder = args.logs / args.experiment_name
        if Path(args.experiment_name).name != args.experiment_name:
            raise ValueError(
                f"--experiment_name {args.experiment_name} must be the name of a run; "
                "give the folder of all runs with --logs"
            )
        follow(folder, args.every, browser=not args.no_browser and has_screen())


def has_screen() -> bool:
    """Return True if a graphical browser can open here."""
    variables = ("DISPLAY", "WAYLAND_DISPLAY")
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, variables))


def follow(folder: Path, every: float, browser: bool) -> None:
    """Plot a run's losses until it ends; wait for its first step."""
    metrics, output = folder / "metrics.jsonl", folder / "live.png"
    drawn = waiting = False
    size = -1
    while True:
        running = in_use(folder)  # checked before reading, so that the last plot is complete
        new_size = metrics.stat().st_size if metrics.is_file() else 0
        if new_size > 0 and new_size != size:
            size = new_size
            [run] = open_runs([folder])
            plot_losses(run, output, target_of(folder, run.rows[-1]["phase"]))
            if not drawn:
                page = PAGE.format(title=folder.name, ms=round(1000 * every))
                write_text(folder / "live.html", page)
                print(f"curve: {output}, and in a browser {folder / 'live.html'}", flush=True)
                if browser:
                    webbrowser.open((folder / "live.html").resolve().as_uri())
            drawn = True
        if drawn and not running:
            print(f"{folder.name} is not training; last step: {run.rows[-1]['step']:,}")
            return
        if not drawn and not waiting:
            waiting = True
            print(
                f"waiting for the first step of {folder}; start the run with "
                f"--name {folder.name}; Ctrl-C ends this command",
                flush=True,
            )
        time.sleep(every)


def target_of(folder: Path, phase: str) -> float | None:
    """Return the target loss in the config of a run's phase, or None."""
    path = folder / f"{phase}.config.yaml"
    target = read_yaml_file(path).get("target_loss") if path.is_file() else None
    return target if isinstance(target, (int, float)) else None


if __name__ == "__main__":
    main()

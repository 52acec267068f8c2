"""W&B and TensorBoard: metrics, evaluations, gates and chat samples of a run, in grouped charts.

`wandb.json` in a log folder names its W&B run. All commands that log to the folder continue this
run: restarts, later phases, and a plan's evaluations.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files import read_lines, read_object, write_json
from yaml_file import read_yaml_file

RUN_FILE, URLS, BOARD = "wandb.json", "wandb_run_urls.txt", "tensorboard"
SAMPLES = "samples.jsonl"  # written by evals/samples.py
MAX_SAMPLES = 200  # newest rows in the samples table
LOCAL_MODES = ("offline", "dryrun", "disabled")  # values of WANDB_MODE that need no login
# Names of charts. Keys of metrics.jsonl that are neither here nor in PREFIXES go to train/.
CHARTS = {
    "tokens_per_s": "perf/tokens_per_second",
    "step_s": "perf/step_seconds",
    "data/wait_frac": "perf/data_wait_fraction",
    "mfu": "perf/mfu",
    "memory_gb": "perf/memory_gb",
    "gpu_util": "perf/gpu_utilization",
    "tokens": "data/tokens",
    "batch_index": "data/batch_index",
    "batch_tokens": "data/batch_tokens",
    "sequence_length": "data/sequence_length",
    "lr": "optim/lr",
    "weight_decay": "optim/weight_decay_factor",
    "beta2": "optim/beta2",
    "momentum": "optim/momentum",
    "rope_theta": "model/rope_theta",
    "short_window": "model/short_window",
    "long_window": "model/long_window",
    "softcap": "model/softcap",
    "expert_load/min": "experts/load_min",
    "expert_load/max": "experts/load_max",
    "max_violation": "experts/max_violation",
    "router_entropy": "experts/router_entropy",
    "dropped_tokens": "experts/dropped_tokens",
}
PREFIXES = {  # the rest of the key follows
    "val/": "val/",
    "lr.": "optim/lr_factor_",
    "beta2.": "optim/beta2_",
    "multi_token.": "train/multi_token_weight_",
}
NOT_CHARTS = ("step", "end", "phase")  # step is the x-axis


def chart_name(key: str) -> str:
    """Return the W&B and TensorBoard name of a key of metrics.jsonl."""
    for prefix, name in PREFIXES.items():
        if key.startswith(prefix):
            return name + key.removeprefix(prefix)
    return CHARTS.get(key, f"train/{key}")


def charts(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of one row of metrics.jsonl by chart name.

    The load of each expert, a list per layer, becomes its minimum and maximum.
    """
    loads = [load for layer in values.get("expert_load", ()) for load in layer]
    extremes = {"expert_load/min": min(loads), "expert_load/max": max(loads)} if loads else {}
    return {
        chart_name(key): value
        for key, value in {**values, **extremes}.items()
        if isinstance(value, (int, float)) and key not in NOT_CHARTS
    }


def scores(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Flatten nested evaluation results to chart names, e.g. "eval/hellaswag/acc_norm"."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        number = value.get("value") if isinstance(value, dict) else value
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            flat[f"{prefix}/{name}"] = number
        elif isinstance(value, dict):
            flat |= scores(value, f"{prefix}/{name}")
    return flat


@dataclass(frozen=True)
class Table:
    """A table with text or numbers in its columns."""

    columns: tuple[str, ...]
    rows: list[list[Any]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        cells = [["" if cell is None else _cell(str(cell)) for cell in line] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def gate_table(events: list[dict[str, Any]]) -> Table:
    """Return all decisions of a plan, one row per gate. events: rows of events.jsonl."""
    columns = ("where", "metric", "value", "go", "no-go", "compared with", "verdict", "decision")
    rows: list[list[Any]] = []
    for event in events:
        gates, values = event.get("gates"), event.get("values")
        if event.get("event") != "gate" or not isinstance(gates, list) or not values:
            continue
        step = event.get("step")
        where = f"at step {step}" if isinstance(step, int) else f"after {step}"
        verdicts = event.get("verdicts") or [""] * len(gates)
        decision = event["outcome"] + (", accepted" if event.get("accepted") else "")
        for gate, value, verdict in zip(gates, values, verdicts, strict=True):
            bounds = (gate["go"], gate["no_go"], gate.get("against", ""))
            rows.append([where, gate["metric"], value, *bounds, verdict, decision])
    return Table(columns, rows)


def _print(text: str) -> None:
    print(text, flush=True)


class Trackers:
    """The W&B run and the TensorBoard files of a log folder, if they are configured.

    After open(), errors do not reach the caller: `say` prints the error once, and that tracker (or
    only its tables) receives nothing more. The log folder still has everything.
    """

    def __init__(
        self,
        folder: Path,
        project: str | None = None,
        tensorboard: bool = False,
        say: Callable[[str], None] = _print,
    ):
        """ValueError if a configured package is not installed."""
        self.folder, self.project, self.tensorboard, self.say = folder, project, tensorboard, say
        self.wandb: Any = None
        self.board: Any = None
        self.tables = True
        if project:
            try:
                import wandb  # noqa: F401
            except ImportError as error:
                raise ValueError(
                    "log.wandb_project is set but wandb is not installed; run pip install wandb"
                ) from error
        if tensorboard:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ImportError as error:
                raise ValueError(
                    "log.tensorboard is set but tensorboard is not installed; "
                    "run pip install tensorboard"
                ) from error
        self.samples_logged = len(self._samples())

    def _samples(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / SAMPLES) if self.project or self.tensorboard else []

    def open(self, step: int, phase: str, name: str | None, run: dict[str, Any]) -> None:
        """Begin or continue at `step`, and print where W&B shows the run.

        name: of the W&B run; default: the run's, plus the phase in a separate log folder. run: the
        settings. TensorBoard removes later steps; W&B shows repeated steps twice. ValueError if
        W&B cannot be used.
        """
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with self._guarded("TensorBoard"):
                if self.board:
                    self.board.close()
                self.board = SummaryWriter(str(self.folder / BOARD), purge_step=step + 1)
        if self.project and not self.wandb:
            try:
                self._open_wandb(self.project, phase, name, run)
            except Exception as error:
                raise unusable(error) from error

    def _open_wandb(self, project: str, phase: str, name: str | None, run: dict[str, Any]) -> None:
        saved = read_object(self.folder / RUN_FILE) or {}
        owner = (read_object(self.folder / "run.json") or {}).get("id")  # training/run_folder.py
        if saved.get("project") != project or saved.get("owner") != owner:
            saved = {}
        group = run.get("run", self.folder.name)
        own_folder = self.folder.name == phase  # SFT, DPO and branches
        content = {
            "id": saved.get("id", uuid.uuid4().hex[:12]),
            "project": project,
            "name": name or saved.get("name") or (f"{group}/{phase}" if own_folder else group),
            "group": group,
        }
        self.wandb = _init(self.folder, **content, job_type=phase if own_folder else None)
        if self.wandb.disabled:
            return
        self.wandb.config.update(self._config(run, phase), allow_val_change=True)
        content["id"] = self.wandb.id  # a sweep sets its own
        with suppress(OSError):
            write_json(self.folder / RUN_FILE, {**content, "owner": owner})
        self.say(f"W&B: {self._record_url()}")

    def _config(self, run: dict[str, Any], phase: str) -> dict[str, Any]:
        """Return settings of all phases so far, and the commit and hardware of this start."""
        path = self.folder / "hyperparameters.yaml"
        phases = read_yaml_file(path) if path.is_file() else {}
        environment = read_object(self.folder / f"{phase}.environment.json") or {}
        return {**run, "environment": environment, "phases": phases}

    def _record_url(self) -> str:
        """Add the run's URL to the list of W&B runs, once, and return it."""
        offline = f"offline; send it with wandb sync {self.folder / 'wandb'}"
        url: str = offline if self.wandb.offline else self.wandb.url
        path = self.folder / URLS
        with suppress(OSError):
            known = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
            if url not in known:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(f"{url}\n")
        return url

    def metrics(self, values: dict[str, Any]) -> None:
        """Log a row of metrics.jsonl."""
        self._log(values["step"], charts(values))

    def samples(self, step: int) -> None:
        """Log chat samples that were written since the last call."""
        rows = self._samples()
        new = rows[self.samples_logged :]
        self.samples_logged = len(rows)
        if not new:
            return
        columns = ("when", "prompt", "reply")
        texts = [[row.get(name, "") for name in ("title", "prompt", "reply")] for row in rows]
        kept = Table(columns, texts[-MAX_SAMPLES:])
        self._log_table(step, "samples/chat", kept, Table(columns, texts[-len(new) :]))

    def evaluation(self, step: int, metrics: Mapping[str, Any], prefix: str, gates: Table) -> None:
        """Log the scores of a checkpoint, and the table of all decisions if it has rows."""
        self._log(step, scores(metrics, prefix))
        if gates.rows:
            self._log_table(step, "gates/decisions", gates, gates)

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        with self._guarded("W&B"):
            if self.wandb and numbers:
                # Not log(step=...): W&B drops steps below the last step, which a restart repeats.
                self.wandb.log({"step": step, **numbers})
        with self._guarded("TensorBoard"):
            for name, value in numbers.items() if self.board else ():
                self.board.add_scalar(name, value, step)

    def _log_table(self, step: int, name: str, table: Table, new: Table) -> None:
        """Log a table. new: the new rows, for TensorBoard, which shows one text per step."""
        with self._guarded("W&B tables"):  # files, which W&B uploads apart from points
            if self.wandb and self.tables:
                import wandb

                content = wandb.Table(columns=list(table.columns), data=table.rows)
                self.wandb.log({"step": step, name: content})
        with self._guarded("TensorBoard"):
            if self.board:
                self.board.add_text(name, new.markdown(), step)

    def alert(self, title: str, text: str) -> None:
        """Send a W&B alert; unlike the other methods, raise an error on failure."""
        self.wandb.alert(title=title, text=text)

    def close(self, failed: bool = False) -> None:
        """Close both trackers; may be called twice."""
        with self._guarded("TensorBoard"):
            if self.board:
                self.board.close()
        with self._guarded("W&B"):
            if self.wandb:
                self.wandb.finish(exit_code=int(failed))
        self.board = self.wandb = None

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if name == "W&B":
                self.wandb = None
            elif name == "TensorBoard":
                self.board = None
            else:
                self.tables = False
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self.say(
                f"warning: {name}: nothing more is logged ({reason}); {self.folder} has it all"
            )


def record_evaluation(
    folder: Path, step: int, metrics: Mapping[str, Any], events: Path, prefix: str = "eval"
) -> None:
    """Log a plan's evaluation to the W&B run and the TensorBoard files of a log folder, if any.

    events: events.jsonl of the plan, whose gates become a table. An error is only printed.
    """
    saved = read_object(folder / RUN_FILE)
    if saved is None and not (folder / BOARD).is_dir():
        return
    trackers = Trackers(folder)
    with trackers._guarded("TensorBoard"):
        if (folder / BOARD).is_dir():
            from torch.utils.tensorboard import SummaryWriter

            trackers.board = SummaryWriter(str(folder / BOARD))
    with trackers._guarded("W&B"):
        if saved:
            saved.pop("owner", None)
            trackers.wandb = _init(folder, **saved)
    trackers.evaluation(step, metrics, prefix, gate_table(read_lines(events)))
    trackers.close()
    if saved:
        import wandb

        with suppress(Exception, SystemExit):
            wandb.teardown()  # W&B's service would outlive this call in a plan's process


def _init(folder: Path, **options: Any) -> Any:
    """Start or continue a W&B run whose files are in `folder`/wandb."""
    wandb = _silenced()
    run = wandb.init(dir=str(folder), resume="allow", **options)
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _silenced() -> Any:
    """Import wandb without its messages; our log line shows the URL."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb


def log_in() -> None:
    """Log in to W&B, asking for a key on a terminal. ValueError if it fails."""
    try:
        wandb = _silenced()
        if wandb.setup().settings.mode in LOCAL_MODES or wandb.login(prompt=False):
            return
        wandb.termsetup(wandb.Settings(), None)  # W&B's questions
        wandb.login()
        wandb.termsetup(wandb.Settings(silent=True), None)
    except ImportError:
        return  # Trackers raises the error
    except Exception as error:
        raise unusable(error) from error


def unusable(error: Exception) -> ValueError:
    todo = "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to send the run later"
    return ValueError(f"W&B cannot be used ({' '.join(str(error).split())[:300]}); {todo}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")

"""Replacements of wandb and torch.utils.tensorboard that record what a run logs, for tests."""

import types
from pathlib import Path
from typing import Any


class FakeWandb(types.ModuleType):
    """The part of wandb 0.31 that a run uses. tests/test_trackers.py also runs the real one."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.points: list[dict[str, Any]] = []  # of all runs, in order
        self.alerts: list[str] = []
        self.ended: list[int] = []  # exit codes
        self.silent = False
        self.config: dict[str, Any] = {}
        self.metrics: dict[str, dict[str, Any]] = {}
        self.mode, self.error = "online", ""

    def Settings(self, silent: bool = False) -> types.SimpleNamespace:
        return types.SimpleNamespace(silent=silent, mode=self.mode)

    def setup(self, settings: Any = None) -> types.SimpleNamespace:
        self.silent = settings.silent if settings else self.silent
        return types.SimpleNamespace(settings=self.Settings())

    def teardown(self) -> None:
        pass

    def init(self, **options: Any) -> types.SimpleNamespace:
        if self.error:
            raise RuntimeError(self.error)
        self.inits.append(options)
        return types.SimpleNamespace(
            id=options["id"],
            url=f"https://wandb.example/{options['project']}/{options['id']}",
            offline=self.mode == "offline",
            disabled=self.mode == "disabled",
            config=types.SimpleNamespace(update=self.update),
            define_metric=lambda name, **how: self.metrics.update({name: how}),
            log=self.log,
            alert=lambda title, text: self.alerts.append(title),
            finish=lambda exit_code: self.ended.append(exit_code),
        )

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        assert allow_val_change  # a later phase changes settings
        self.config.update(values)

    def log(self, values: dict[str, Any]) -> None:
        if self.error:
            raise RuntimeError(self.error)
        self.points.append(values)

    def Table(self, columns: list[str], data: list[list[Any]]) -> types.SimpleNamespace:
        assert all(len(row) == len(columns) for row in data)
        return types.SimpleNamespace(columns=columns, data=data)

    def series(self, name: str) -> list[tuple[int, Any]]:
        """Return (step, value) of a chart."""
        return [(point["step"], point[name]) for point in self.points if name in point]


class FakeTensorboard(types.ModuleType):
    """torch.utils.tensorboard: one log per folder."""

    def __init__(self) -> None:
        super().__init__("torch.utils.tensorboard")
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.texts: dict[str, list[tuple[int, str]]] = {}
        self.opened: list[tuple[str, int | None]] = []

    def SummaryWriter(self, folder: str, purge_step: int | None = None) -> types.SimpleNamespace:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.opened.append((folder, purge_step))
        for points in self.scalars.values() if purge_step is not None else ():
            points[:] = [point for point in points if point[0] < purge_step]
        return types.SimpleNamespace(
            add_scalar=lambda name, value, step: self.scalars.setdefault(name, []).append(
                (step, value)
            ),
            add_text=lambda name, text, step: self.texts.setdefault(name, []).append((step, text)),
            close=lambda: None,
        )

"""Who runs the stages of the pipeline: this machine, a Slurm cluster or a Ray cluster, by datatrove's executors.

A stage is a list of datatrove steps and a number of tasks. A task that is done leaves a marker and is not done again, so
that what was killed goes on with the tasks that are left; a task begins its files anew.
"""

import contextlib
import fcntl
import io
import multiprocessing
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from tqdm import tqdm

from data.pipeline.recipe import ExecutorConfig
from files import is_full
from machine import cpus


class Stage(NamedTuple):
    name: str
    folder: Path  # where its logs/, stats/ and completions/ go
    steps: list[PipelineStep]
    tasks: int


def run_stages(stages: list[Stage], config: ExecutorConfig, lock: Path, jobs: Path) -> bool:
    """Run stages one after the other. False where they were only handed in (Slurm) and are still to run.

    lock: of `alone`, which is held; local tasks hold one beside it. jobs: where ids of Slurm jobs are kept. ValueError where
    a task stopped for a reason that a user can do something about; the tasks that are done stay done.
    """
    logger.remove()  # the log goes to <stage>/logs; what a user should know is printed
    if config.kind == "slurm":
        return not _submit(stages, config, jobs)
    with _ray(config) if config.kind == "ray" else contextlib.nullcontext():
        for stage in stages:
            executor = (
                _ray_executor(stage, config)
                if config.kind == "ray"
                else _local_executor(stage, config, lock)
            )
            try:
                executor.run()
            except (ValueError, OSError, BrokenProcessPool) as error:
                todo = "Free some space" if is_full(error) else "Mend that"
                raise ValueError(
                    f"{stage.name} stopped: {error}; the log is {stage.folder / 'logs'}. "
                    f"{todo}; the same command then goes on with the tasks that are left"
                ) from error
            left = executor.get_incomplete_ranks(skip_completed=True)
            if left:  # Ray gives up on a task after some attempts
                raise ValueError(
                    f"{stage.name}: {len(left)} of {stage.tasks} tasks failed; see {stage.folder / 'logs'}"
                )
    return True


class _Local(LocalPipelineExecutor):
    """datatrove's executor with a pool that notices a worker's death, dies with its parent, and is silent but for a bar."""

    def __init__(self, stage: Stage, lock: Path, workers: int):
        super().__init__(
            stage.steps, tasks=stage.tasks, workers=workers, logging_dir=str(stage.folder)
        )
        self.name, self.lock = stage.name, lock

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        done = self.tasks - len(ranks)
        with tqdm(
            total=self.tasks, initial=done, desc=self.name, unit="task", leave=False, disable=None
        ) as bar:
            if self.workers == 1:
                for rank in ranks:
                    deepcopy(self).task(rank)
                    bar.update()
                return
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["data.pipeline.steps"])
            with ProcessPoolExecutor(self.workers, context, _die_with, (os.getpid(),)) as pool:
                running = [pool.submit(self.task, rank) for rank in ranks]
                try:
                    for future in as_completed(running):
                        future.result()
                        bar.update()
                finally:
                    pool.shutdown(wait=True, cancel_futures=True)

    def task(self, rank: int) -> None:
        """Run one task; the lock is held for as long as it may write."""
        with (
            open(_tasks(self.lock), "a+", encoding="utf-8") as file,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            fcntl.lockf(file, fcntl.LOCK_SH)
            self._run_for_rank(rank)


def _die_with(parent: int) -> None:
    """End this process when process `parent` ends, even by SIGKILL: what a killed run left undone, the next one does."""

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            select.select([os.pidfd_open(parent)], [], [])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _local_executor(stage: Stage, config: ExecutorConfig, lock: Path) -> _Local:
    return _Local(stage, lock, min(config.workers or cpus(), stage.tasks))


def _tasks(lock: Path) -> Path:
    return lock.with_suffix(".tasks")


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold the lock of a store; waits for tasks that a killed run has left behind, refuses a second run."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(lock, "a+", encoding="utf-8") as run,
        open(_tasks(lock), "a+", encoding="utf-8") as tasks,
    ):
        try:
            fcntl.lockf(run, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"another prepare_data is at work in {lock.parent.parent}; wait for it or end it"
            ) from None
        try:
            fcntl.lockf(tasks, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            print("waiting for the tasks of a run that was killed", file=sys.stderr, flush=True)
            fcntl.lockf(tasks, fcntl.LOCK_EX)
        fcntl.lockf(tasks, fcntl.LOCK_UN)
        yield


@contextlib.contextmanager
def _ray(config: ExecutorConfig) -> Iterator[None]:
    try:
        import ray
    except ImportError:
        raise ValueError(
            "executor.kind=ray needs Ray; run pip install -r requirements-cluster.txt"
        ) from None
    try:
        ray.init(
            address=config.ray_address,
            num_cpus=None if config.ray_address else config.workers or None,
            log_to_driver=False,
        )
    except ConnectionError as error:
        raise ValueError(f"there is no Ray cluster at {config.ray_address}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _ray_executor(stage: Stage, config: ExecutorConfig) -> RayPipelineExecutor:
    return RayPipelineExecutor(
        stage.steps,
        tasks=stage.tasks,
        workers=config.workers or -1,
        mem_per_cpu_gb=config.memory_gb,
        logging_dir=str(stage.folder),
    )


def check_queue(jobs: Path) -> None:
    """ValueError where jobs that were handed in to Slurm are still queued or running: they and new ones would do the same."""
    if jobs.is_file():
        try:
            queued = subprocess.run(
                ["squeue", "-h", "-o", "%A", "-j", jobs.read_text(encoding="utf-8")],
                capture_output=True,
                text=True,
                encoding="utf-8",
            )
        except FileNotFoundError:
            return
        if queued.stdout.split():
            raise ValueError(
                f"Slurm jobs {', '.join(sorted(set(queued.stdout.split())))} of an earlier call are still queued or running; "
                "wait for them, or end them with scancel"
            )


def _submit(stages: list[Stage], config: ExecutorConfig, jobs: Path) -> bool:
    """Hand the stages that are not done to Slurm as job arrays, each waiting for the one before. False where all are done."""
    before, submitted = None, []
    for stage in stages:
        executor = SlurmPipelineExecutor(
            stage.steps,
            tasks=stage.tasks,
            time=f"{config.hours}:00:00",
            partition=config.partition,
            workers=config.workers or -1,
            mem_per_cpu_gb=config.memory_gb,
            job_name=f"nanollama-{stage.name.replace(' ', '_')}",
            venv_path=str(Path(sys.prefix) / "bin" / "activate"),
            qos=None,
            depends=before,
            logging_dir=str(stage.folder),
        )
        try:
            executor.run()
        except FileNotFoundError as error:
            raise ValueError(
                f"executor.kind=slurm needs {error.filename}, which this machine does not have"
            ) from None
        if executor.job_id != -1:
            submitted.append(str(executor.job_id))
            jobs.write_text(",".join(submitted), encoding="utf-8")
        before = executor
    return bool(submitted)

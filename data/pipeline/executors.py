"""Run pipeline stages with datatrove's executors: locally, on a Slurm cluster or on a Ray cluster.

A stage is a list of datatrove steps and a number of tasks. A finished task writes a marker, and a
restarted run skips the task. An unfinished task rewrites its files from the beginning.
"""

import contextlib
import fcntl
import io
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

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
    folder: Path  # for logs/, stats/ and completions/
    steps: list[PipelineStep]
    tasks: int


def run_stages(stages: list[Stage], config: ExecutorConfig, lock: Path, jobs: Path) -> bool:
    """Run stages in order; return False if they were only submitted to Slurm.

    lock: held by `exclusive_run`; local tasks hold a second lock beside it. jobs: file of Slurm job
    ids. ValueError if a task failed for a reason the user can fix; finished tasks stay finished.
    """
    logger.remove()  # datatrove logs to <stage>/logs instead of the console
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
                todo = "Free some space" if is_full(error) else "Fix the cause"
                raise ValueError(
                    f"{stage.name} failed: {error}; the log is {stage.folder / 'logs'}. "
                    f"{todo}, then run the same command again: it continues with the "
                    "unfinished tasks"
                ) from error
            failed = executor.get_incomplete_ranks(skip_completed=True)
            if failed:  # Ray gives up on a task after some attempts
                raise ValueError(
                    f"{stage.name}: {len(failed)} of {stage.tasks} tasks failed; see "
                    f"{stage.folder / 'logs'}, fix the cause and run the same command again: "
                    "finished tasks are kept"
                )
    return True


class _Local(LocalPipelineExecutor):
    """datatrove's local executor with a pool that fails if a worker dies and ends with its parent.

    Prints only a progress bar.
    """

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
            with ProcessPoolExecutor(
                self.workers, context, _exit_with_parent, (os.getpid(),)
            ) as pool:
                running = [pool.submit(self.task, rank) for rank in ranks]
                try:
                    for future in as_completed(running):
                        future.result()
                        bar.update()
                finally:
                    pool.shutdown(wait=True, cancel_futures=True)

    def task(self, rank: int) -> None:
        """Run one task, holding the task lock while it writes."""
        with (
            open(_task_lock(self.lock), "a+", encoding="utf-8") as file,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            fcntl.lockf(file, fcntl.LOCK_SH)
            self._run_for_rank(rank)


def _exit_with_parent(parent: int) -> None:
    """End this process when process `parent` ends, even by SIGKILL; the next run continues."""

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            select.select([os.pidfd_open(parent)], [], [])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _local_executor(stage: Stage, config: ExecutorConfig, lock: Path) -> _Local:
    return _Local(stage, lock, min(config.workers or cpus(), stage.tasks))


def _task_lock(lock: Path) -> Path:
    return lock.with_suffix(".tasks")


@contextlib.contextmanager
def exclusive_run(lock: Path) -> Iterator[None]:
    """Hold a store's lock: refuse a concurrent run, wait for tasks of a killed one."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(lock, "a+", encoding="utf-8") as run,
        open(_task_lock(lock), "a+", encoding="utf-8") as tasks,
    ):
        try:
            fcntl.lockf(run, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"another prepare_data is running in {lock.parent.parent}; wait for it or stop it"
            ) from None
        try:
            fcntl.lockf(tasks, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            print("waiting for the tasks of a killed run", file=sys.stderr, flush=True)
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
        raise ValueError(
            f"no Ray cluster answers at executor.ray_address={config.ray_address}: {error}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


class _Ray(RayPipelineExecutor):
    """datatrove's Ray executor, but a task's process ends on SIGTERM.

    datatrove forks the process from a Ray worker and ends it with SIGTERM. The fork inherits the
    worker's handler, which can wait forever for threads that the fork lacks.
    """

    def _run_for_rank(self, *args: Any, **kwargs: Any) -> Any:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return super()._run_for_rank(*args, **kwargs)


def _ray_executor(stage: Stage, config: ExecutorConfig) -> RayPipelineExecutor:
    return _Ray(
        stage.steps,
        tasks=stage.tasks,
        workers=config.workers or -1,
        mem_per_cpu_gb=config.memory_gb,
        logging_dir=str(stage.folder),
    )


def check_queue(jobs: Path) -> None:
    """ValueError if submitted Slurm jobs are queued or running: new jobs would repeat them."""
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
                f"Slurm jobs {', '.join(sorted(set(queued.stdout.split())))} of an earlier run are "
                "still queued or running; wait for them, or cancel them with scancel"
            )


def _submit(stages: list[Stage], config: ExecutorConfig, jobs: Path) -> bool:
    """Submit unfinished stages to Slurm as dependent job arrays; False if all are finished."""
    previous, submitted = None, []
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
            depends=previous,
            logging_dir=str(stage.folder),
        )
        try:
            executor.run()
        except FileNotFoundError as error:
            raise ValueError(
                f"executor.kind=slurm needs {error.filename}, which is not installed"
            ) from None
        if executor.job_id != -1:
            submitted.append(str(executor.job_id))
            jobs.write_text(",".join(submitted), encoding="utf-8")
        previous = executor
    return bool(submitted)

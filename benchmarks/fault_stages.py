"""Fault cases of SFT, DPO, GGUF export, data and tokenizer; full disks; a removed log folder."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.fault_lab import Lab, Row
from benchmarks.fault_pipeline import STORE, at_save, row_of
from benchmarks.fault_points import FILLER, Point, point
from benchmarks.fault_runs import Failed
from benchmarks.fault_sites import (
    DOWNLOAD,
    EXPORT,
    PREPARE,
    TOKENIZER,
    TRAIN,
    Site,
    checksums,
    compare_sites,
    tune,
)

GGUF = EXPORT.format(checkpoint="checkpoints/tiny/dpo/step_6").replace("{{", "{").replace("}}", "}")
KB = 1024
FULL = ("No space left on device", "the disk is full", "make room there", "free some space")


def run_faults(site: Site, command: str, points: list[Point]) -> None:
    """Run a command once per fault, then until it completes."""
    for fault in points:
        site.run_faulty(command, fault)
    site.finish(command)


def kill_sft(lab: Lab) -> Row:
    site = lab.sites.site("sft-killed", "checkpoints/tiny/midtrain")
    array, first = "*chats*ids.npy", {"program": "train_sft.py.0"}
    points = [
        point("write", array, "limit", size=KB, **first),
        at_save("sft", 2, "*", delay=0.02),
        point("write", saved_part("sft", 4) + "/state/trainer.json*", whom="*", **first),
        point("start", program="train_sft.py.1", whom="*", delay=0.5),
        point("rename", "*store/sft/chats*", **first),
        point("write", "*sft/run.lock", whom="*", **first),
        at_save("sft", 4, "*", delay=0.01),
        point("write", saved_part("sft", 6) + "/manifest.json*", "limit", size=200, **first),
        point("rename", "*sft/step_6", **first),
    ]
    chosen = points[:3] if lab.quick else [points[i] for i in (3, 0, 4, 5, 1, 2, 6, 7, 8)]
    run_faults(site, tune("sft"), chosen)
    comparison = compare_sites(site, lab.sites.reference(), "sft")
    done = f"{len(chosen)} times: in start-up, caching, steps and saves"
    done = "3 times: caching, in steps, in a save" if lab.quick else done
    return row_of(site, comparison, "SIGKILL of SFT", done, "prepared rows are complete or rebuilt")


def saved_part(phase: str, step: int) -> str:
    return f"*{phase}/step_{step}.tmp"


def kill_dpo(lab: Lab) -> Row:
    site = lab.sites.site("dpo-killed", "checkpoints/tiny/sft")
    first = {"program": "train_dpo.py.0"}
    points = [
        point("rename", "*store/pairs/pairs*", "limit", size=300, **first),
        point("write", saved_part("dpo", 2) + "/state/trainer.json*", whom="*", **first),
        at_save("dpo", 2, "*", delay=0.02),
        point("start", program="train_dpo.py.1", whom="*", delay=0.5),
        point("write", "*pairs*.npy", "limit", nth=2, size=KB, **first),
        point("rename", "*reference.safetensors", whom="*", **first),
        point("write", saved_part("dpo", 4) + "/manifest.json*", "limit", size=200, **first),
    ]
    chosen = points[:2] if lab.quick else [points[i] for i in (3, 4, 0, 5, 1, 2, 6)]
    for fault in chosen:
        site.run_faulty(tune("dpo"), fault)
        halves = list((site.folder / "checkpoints/tiny/dpo").glob(".reference*.tmp/.tmp*"))
        if fault is points[0] and len(halves) != 1:
            raise Failed("not killed while writing the reference log-probabilities")
    site.finish(tune("dpo"))
    comparison = compare_sites(site, lab.sites.reference(), "dpo")
    done = f"{len(chosen)} times: in start-up, caching, the reference's file, steps and saves"
    done = "twice: in the reference's file, in a save" if lab.quick else done
    return row_of(
        site,
        comparison,
        "SIGKILL of DPO",
        done,
        "reference log-probabilities are complete or recomputed",
    )


def kill_export(lab: Lab) -> Row:
    site = lab.sites.site("export-killed", "checkpoints/tiny/dpo", "logs", "results", "store")
    expected = checksums(lab.sites.reference(), "gguf")
    points = [
        point("write", "*gguf/.tiny*", "limit", size=20 * KB),
        point("write", "*gguf/*README.md*", "limit", size=50),
        point("rename", "*f16.gguf"),
        point("rename", "*q8_0.gguf"),
        point("write", "*gguf/*Modelfile*", "limit", size=20),
    ]
    for fault in points[:2] if lab.quick else points:
        site.run_faulty(GGUF, fault)
        for name, content in checksums(site, "gguf").items():
            if name.endswith(".gguf") and expected.get(name) != content:
                raise Failed(f"{name} is incomplete under its final name")
    site.finish(GGUF)
    comparison = compare_sites(site, lab.sites.reference(), "gguf")
    done = "5 times: in the tensors, before either rename, in the model card and the Modelfile"
    done = "twice: in the tensors, in the model card" if lab.quick else done
    return row_of(
        site, comparison, "SIGKILL of GGUF export", done, "no incomplete file under a final name"
    )


def kill_data(lab: Lab) -> Row:
    site = lab.sites.site("data-killed", "store/tokenizer")
    downloads = [point("rename", "*manifest.json"), point("rename", "*documents/first")]
    for name in ("first", "second"):
        faults = [] if lab.quick or name == "second" else downloads[:1]
        run_faults(site, DOWNLOAD.format(name), faults)
    worker = "scripts.prepare_data" if lab.quick else "worker"
    shard = "*tokens/*/.train-*.tmp"
    points = [
        point("start", program="scripts.prepare_data", delay=1.5),
        point("write", "*counts*", whom="*"),
        point("write", shard, "limit", size=KB, program=worker),
        point("write", shard, whom="*"),
        point("write", "*report.json*", "limit", size=60),
        point("rename", "*store/tokens/first", whom="*"),
        point("rename", "*store/tokens/second"),
    ]
    run_faults(site, PREPARE, [points[2], points[6]] if lab.quick else points)
    comparison = compare_sites(site, lab.sites.reference(), "data", "documents")
    done = (
        "8 times: download, start-up, cleaning, in a shard (a worker, all), manifests, the report"
    )
    done = "twice: in a shard, between two sources" if lab.quick else done
    return row_of(site, comparison, "SIGKILL of the data pipeline", done, "")


def kill_tokenizer(lab: Lab) -> Row:
    site = lab.sites.site("tokenizer-killed", "store/documents")
    points = [
        point("rename", "*store/tokenizer"),
        point("read", "*documents/second/manifest.json*"),
        point("start", delay=1.0),
        point("read", "*documents/second/manifest.json*", delay=0.02),
    ]
    run_faults(site, TOKENIZER, points[:1] if lab.quick else points)
    comparison = compare_sites(site, lab.sites.reference(), "tokenizer")
    done = "before its rename" if lab.quick else "4 times: in start-up, reading, training, renaming"
    return row_of(site, comparison, "SIGKILL of tokenizer training", done, "")


# Full disks


class NoMount(Exception):
    """This machine cannot run a case; the message says why."""


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a tmpfs of some size at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    result = subprocess.run(mount, capture_output=True, encoding="utf-8")
    if result.returncode:
        raise NoMount(
            f"no tmpfs can be mounted ({result.stderr.strip()}); run it under unshare -rm"
        )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(
    lab: Lab,
    name: str,
    command: str,
    disk: str,
    faults: list[Point],
    parts: tuple[str, ...],
    copied: tuple[str, ...],
) -> Row:
    site = lab.sites.site(name)
    reference = lab.sites.reference()
    folder = site.folder / disk
    with small_disk(folder, "64m"):
        for path in copied:
            shutil.copytree(reference.folder / path, site.folder / path, dirs_exist_ok=True)
        for fault in faults:
            fault["folder"] = str(folder)
            ended = site.run_faulty(command, fault)
            reported = any(words in ended.output for words in FULL)
            if ended.status != 2 or not reported or "Traceback" in ended.output:
                raise Failed(f"status {ended.status} on a full disk: {ended.output[-600:]}")
            (folder / FILLER).unlink()
        site.finish(command)
        comparison = compare_sites(site, reference, *parts)
    titles = {
        "disk-save": "a pretraining save",
        "disk-cache": "SFT's prepared rows",
        "disk-export": "GGUF export",
    }
    done = f"{len(faults)} times on a tmpfs of 64 MB that fills up"
    note = "status 2 and an error message; the same command continues"
    return row_of(site, comparison, f"a real full disk in {titles[name]}", done, note)


def full_disk_save(lab: Lab) -> Row:
    folder = saved_part("one", 4)
    faults = [
        point("write", folder + "/state/trainer.json*", "fill", size=8 * KB, program="train.py.0"),
        point("write", saved_part("one", 6) + "/config.json", "fill", size=40 * KB),
        point("write", saved_part("one", 8) + "/manifest.json*", "fill", size=0),
        point("start", do="fill", size=8 * KB, program="train.py.1"),
    ]
    disk = "checkpoints"
    return fill_disk(
        lab, "disk-save", TRAIN, disk, faults[: 1 if lab.quick else 4], ("one",), STORE
    )


def full_disk_cache(lab: Lab) -> Row:
    faults = [
        point("write", "*chats*ids.npy", "fill", size=4 * KB),
        point("write", "*chats*manifest.json*", "fill", size=0),
        point("start", do="fill", size=0, program="train_sft.py.0"),
    ]
    copied = ("checkpoints/tiny/midtrain",)
    faults = faults[: 1 if lab.quick else 3]
    return fill_disk(lab, "disk-cache", tune("sft"), "store", faults, ("sft",), copied)


def full_disk_export(lab: Lab) -> Row:
    faults = [
        point("write", "*gguf/.tiny*", "fill", size=24 * KB),
        point("write", "*gguf/*README.md*", "fill", size=0),
        point("start", do="fill", size=0),
    ]
    copied = ("checkpoints/tiny/dpo", "logs", "results", "store")
    return fill_disk(
        lab, "disk-export", GGUF, "gguf", faults[: 2 if lab.quick else 3], ("gguf",), copied
    )


def remove_logs(lab: Lab) -> Row:
    """Rows in the removed files are lost; later rows are written."""
    site = lab.sites.site("logs-removed", *STORE)
    step = 4
    removal = at_save("one", step, "", do="delete", folder="logs")
    ended = site.run(TRAIN, removal)
    if ended.status or not (site.register / "point-0").exists():
        raise Failed(f"status {ended.status} after logs/ was removed: {ended.output[-500:]}")
    site.faults.append({"command": TRAIN, "status": 0, "points": [removal]})
    site.finish(TRAIN)
    comparison = compare_sites(site, lab.sites.reference(), "one", since=step + 1)
    note = f"training continues; compares rows after step {step + 1}, earlier ones are lost"
    return row_of(site, comparison, "logs/ removed during a run", f"at step {step}", note)


CASES: dict[str, Callable[[Lab], Row]] = {
    "kill_sft": kill_sft,
    "kill_dpo": kill_dpo,
    "kill_export": kill_export,
    "kill_data": kill_data,
    "kill_tokenizer": kill_tokenizer,
    "full_disk_save": full_disk_save,
    "full_disk_cache": full_disk_cache,
    "full_disk_export": full_disk_export,
    "remove_logs": remove_logs,
}

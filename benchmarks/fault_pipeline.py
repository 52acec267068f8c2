"""Fault cases of the pipeline driver, stage boundaries, evaluations, launcher and terminal."""

import signal
import time
from collections.abc import Callable

from benchmarks.fault_lab import Lab, Row
from benchmarks.fault_points import Point, point
from benchmarks.fault_runs import Failed
from benchmarks.fault_sites import (
    JUDGED,
    MILESTONE,
    PATIENCE,
    TRAIN,
    TUNED,
    Comparison,
    Site,
    compare_sites,
    tune,
)

TRACE = "Traceback"
ALL_TRAINED = ("one", "midtrain", "sft", "dpo")
STORE = ("store/tokens", "store/tokenizer")
DONE_ONE = ("checkpoints/tiny/one", "logs/tiny", *STORE)  # trained, but the gate has not run


def saved(phase: str, step: int) -> str:
    """Return the pattern of a complete checkpoint's name."""
    return f"*{phase}/step_{step}"


def at_save(phase: str, step: int, whom: str, **more: object) -> Point:
    """Return a point that sends a signal when rank 0 renames a checkpoint."""
    script = {"one": "train.py.0", "dpo": "train_dpo.py.0"}.get(phase, "train_sft.py.0")
    return point("rename", saved(phase, step), program=script, whom=whom, **more)


def row_of(site: Site, comparison: Comparison, fault: str, done: str, note: str = "") -> Row:
    cells = comparison.cells()
    name, commands = site.folder.name, site.commands
    return Row(name, fault, done, comparison.holds, cells, note, commands, kills=site.faults)


def check_stops(site: Site, times: int) -> None:
    """Raise Failed unless training without driver or launcher saved and ended `times` times."""
    paths = sorted((site.folder / "logs").rglob("training_log.md"))
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    if (count := text.count("stopped by a signal and saved")) != times:
        raise Failed(f"training saved and ended {count} times, not {times}: {text[-500:]}")


def kill_driver(lab: Lab) -> Row:
    """Kill only the driver; its stage is still ending when the same command runs again."""
    site = lab.sites.site("driver", *STORE)
    cases = [("one", 6)] if lab.quick else [("one", 6), ("sft", 2), ("dpo", 2)]
    plan, parts = (JUDGED, ("one",)) if lab.quick else (TUNED, ALL_TRAINED)
    for phase, step in cases:
        fault = at_save(phase, step, "scripts.pipeline", pause=lab.pause)
        site.run_faulty(plan, fault, settle=False)
    site.finish(plan)
    site.settle_all()
    check_stops(site, len(cases))
    comparison = compare_sites(site, lab.sites.reference(), *parts, "decision")
    done = f"{len(cases)} times, while its stage trains; the same command immediately"
    note = "the stage saves and ends; no second trainer, no process left"
    return row_of(site, comparison, "SIGKILL of the pipeline driver alone", done, note)


def kill_in_decision(lab: Lab) -> Row:
    site = lab.sites.site("decision", *DONE_ONE)
    driver = {"program": "scripts.pipeline"}
    write = point("write", "*decision.json.tmp", "limit", size=64, **driver)
    rename = point("rename", "*decision.json", **driver)
    for fault in (write,) if lab.quick else (write, rename):
        site.run_faulty(JUDGED, fault)
        if (site.folder / "results/tiny" / f"step_{MILESTONE}" / "decision.json").exists():
            raise Failed("an incomplete decision.json has its final name")
    site.finish(JUDGED)
    decision = site.folder / "results" / "tiny" / f"step_{MILESTONE}" / "decision.json"
    content = decision.read_text(encoding="utf-8")
    sizes = (len(content) // 2,) if lab.quick else (0, len(content) // 2)
    for size in sizes:
        decision.write_text(content[:size], encoding="utf-8")
        site.finish(JUDGED)
    comparison = compare_sites(site, lab.sites.reference(), "one", "decision")
    done = "while writing decision.json, before its rename; then with an empty and a truncated file"
    if lab.quick:
        done = "while writing decision.json; then with a truncated file"
    return row_of(
        site, comparison, "SIGKILL of the driver at a gate", done, "measured once, decided again"
    )


def kill_evaluation(lab: Lab) -> Row:
    site = lab.sites.site("evaluation", *DONE_ONE)
    evaluation = {"program": "evals.eval_perplexity"}
    points = [
        point("write", "*held_out.json*", "limit", size=100, **evaluation),
        point("start", delay=0.5, whom="*", **evaluation),
        point("rename", "*held_out.json", **evaluation),
    ]
    for fault in points[:1] if lab.quick else points:
        site.run_faulty(JUDGED, fault)
    output = site.folder / "results" / "tiny" / f"step_{MILESTONE}" / "held_out.json"
    if output.exists():
        raise Failed("an incomplete result has its final name")
    site.finish(JUDGED)
    if not lab.quick:
        content = output.read_text(encoding="utf-8")
        output.write_text(content[: len(content) // 2], encoding="utf-8")
        output.with_name("decision.json").unlink()
        site.finish(JUDGED)
    comparison = compare_sites(site, lab.sites.reference(), "one", "decision")
    done = "writing results, in start-up with the driver, before the rename; with a truncated file"
    done = "while writing its results" if lab.quick else done
    return row_of(
        site, comparison, "SIGKILL of an evaluation", done, "measured again, no incomplete JSON"
    )


def kill_launcher(lab: Lab) -> Row:
    site = lab.sites.site("launcher", *STORE)
    cases = [(TRAIN, "one", 4)]
    if not lab.quick:
        cases = [(TRAIN, "one", 2), (TRAIN, "one", 8), (tune("midtrain"), "midtrain", 2)]
    for command, phase, step in cases:
        if phase == "midtrain":
            site.finish(TRAIN)
        fault = at_save(phase, step, "scripts.launch", pause=lab.pause)
        site.run_faulty(command, fault, settle=False)
    parts = ("one",) if lab.quick else ("one", "midtrain")
    site.finish(cases[-1][0])
    site.settle_all()
    check_stops(site, len(cases))
    comparison = compare_sites(site, lab.sites.reference(), *parts)
    done = f"{len(cases)} times, while ranks train; the same command immediately"
    note = "the ranks save and end; no process left"
    return row_of(site, comparison, "SIGKILL of the launcher alone", done, note)


def hang_up(lab: Lab) -> Row:
    site = lab.sites.site("terminal", *STORE)
    number = signal.SIGHUP
    cases = (
        [("one", 2, "*")]
        if lab.quick
        else [("one", 2, "scripts.pipeline"), ("midtrain", 2, "*"), ("dpo", 2, "*")]
    )
    plan, parts = (JUDGED, ("one",)) if lab.quick else (TUNED, ALL_TRAINED)
    for phase, step, whom in cases:
        ended = site.run_faulty(plan, at_save(phase, step, whom, number=number))
        if ended.status != 128 + number or "The same command continues" not in ended.output:
            raise Failed(f"status {ended.status} after SIGHUP: {ended.output[-300:]}")
    site.finish(plan)
    comparison = compare_sites(site, lab.sites.reference(), *parts, "decision")
    done = (
        "to all processes of the plan"
        if lab.quick
        else "3 times: to the driver; to all processes, twice"
    )
    return row_of(
        site,
        comparison,
        "SIGHUP (closed terminal)",
        done,
        "status 129, saved at that step or the next",
    )


def kill_between_stages(lab: Lab) -> Row:
    site = lab.sites.site("borders", *DONE_ONE, "results")
    driver = {"program": "scripts.pipeline"}
    borders = [
        at_save("midtrain", 6, "*", delay=0.02),
        point("write", "*sft/stage.json.tmp", "limit", size=40, **driver),
        point("rename", "*sft/stage.json", whom="*", **driver),
        point("start", program="train_sft.py.1", whom="*"),
        at_save("sft", 6, "*"),
        point("start", program="train_dpo.py.0", whom="*"),
        at_save("dpo", 6, "*"),
    ]
    chosen = borders[1:2] if lab.quick else borders
    plan, parts = (f"{TUNED} --skip dpo", ALL_TRAINED[:3]) if lab.quick else (TUNED, ALL_TRAINED)
    for fault in chosen:
        site.run_faulty(plan, fault)
    site.finish(plan)
    comparison = compare_sites(site, lab.sites.reference(), *parts)
    done = f"{len(chosen)} times: after a stage's last checkpoint, in stage.json, at the next start"
    return row_of(site, comparison, "SIGKILL between mid-training, SFT and DPO", done, "")


def two_commands(lab: Lab) -> Row:
    """The second command waits for some seconds, then exits; the first continues."""
    site = lab.sites.site("two", *STORE)
    go = site.folder / "go"
    hold = point("rename", saved("one", 2), "wait", program="train.py.0", folder=str(go))
    command, seconds = (TRAIN, [TRAIN]) if lab.quick else (TUNED, [TRAIN, TUNED])
    first, register = site.begin(command, hold), site.register
    end = time.monotonic() + 60
    while not (register / "point-0").exists() and time.monotonic() < end:
        time.sleep(0.02)
    for second in seconds:
        ended = site.run(second)
        if ended.status != 2 or "is in use by process" not in ended.output or TRACE in ended.output:
            raise Failed(f"the second command: status {ended.status}: {ended.output[-400:]}")
        site.faults.append({"command": second, "status": ended.status, "points": [hold]})
    go.touch()
    if status := first.wait(PATIENCE):
        raise Failed(f"the first command ended with status {status}")
    site.settle(register)
    parts = ("one",) if lab.quick else (*ALL_TRAINED, "decision")
    comparison = compare_sites(site, lab.sites.reference(), *parts)
    done = "train.py twice" if lab.quick else "train.py, then a second driver, during a plan"
    note = "the second exits with status 2 and names the first's process; the first continues"
    return row_of(site, comparison, "two commands in one folder", done, note)


CASES: dict[str, Callable[[Lab], Row]] = {
    "kill_driver": kill_driver,
    "kill_in_decision": kill_in_decision,
    "kill_evaluation": kill_evaluation,
    "kill_launcher": kill_launcher,
    "hang_up": hang_up,
    "kill_between_stages": kill_between_stages,
    "two_commands": two_commands,
}

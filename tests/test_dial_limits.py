"""The dial's limits: data, memory, time, names and gates, and what it says about them."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, VOCAB, complaint_of

from data.corpus.sources import HUB_SOURCES
from data.store import open_shards
from scripts import new_plan
from training.planning import dial, dial_fit, plan_files
from training.planning.cards import GPUS
from training.planning.cost import forecast, forecast_loss, readable_tokens
from training.planning.cpu_plan import choose_cpu, cpu_files, save_seconds
from training.planning.dial import Choice, Request, choose
from training.planning.dial_data import (
    GOALS,
    download_tokens,
    phase_shares,
    round_down,
    round_up,
    source_shares,
)
from training.planning.dial_fit import LEVELS, phase_seconds
from training.planning.dial_gates import forecast_bits, milestone_gates, read_tokens
from training.planning.dial_text import cpu_text, gpu_text
from training.planning.forecast_text import forecast_text
from training.planning.memory import TIGHT, memory
from training.planning.plan import Plan, PlanPhase, load_plan
from training.planning.plan_files import check_name, gpu_files
from training.planning.probe import Probe

WEEKEND = Request("rtx4090", 1, 48)
HOUR = 3600


def total_notes(choice: Choice) -> str:
    return " | ".join(choice.notes)


@pytest.mark.parametrize(
    "request_",
    [
        WEEKEND,
        replace(WEEKEND, parameters=1e9),
        replace(WEEKEND, tokens=1e9),
        replace(WEEKEND, tokens=1e8, parameters=5e8),
        Request("rtx4090", 1, 5000, parameters=3e8),  # far more than 20 per parameter
        Request("laptop8", 1, 700),  # the largest model that fits the memory
    ],
)
def test_the_batch_follows_the_tokens_that_are_trained(request_):
    choice = choose(request_)
    batch = choice.fit.run.data.tokens_per_step
    law = 0.58 * choice.tokens**0.571
    assert law / 1.45 < batch < law * 1.45
    hours = choice.tokens * choice.fit.seconds_per_token / HOUR
    assert hours <= request_.hours
    if not request_.tokens and "end" not in total_notes(choice):
        assert hours > 0.8 * request_.hours


@pytest.mark.parametrize(
    ("request_", "said", "not_said"),
    [
        (replace(WEEKEND, hours=100, parameters=1e9), "reach a lower loss, 2.", "data end"),
        (
            Request("h100", 8, 4000, "code", parameters=4e9),
            "because the data end; no smaller model has a lower loss",
            "reach a lower loss",
        ),
        (replace(WEEKEND, tokens=5e7), "is too few even for the smallest shape", "lower loss"),
        (
            replace(WEEKEND, tokens=1e8, parameters=5e8),
            "--params and --tokens request",
            "lower loss",
        ),
        (replace(WEEKEND, hours=0.12, parameters=19e6), "more hours lower", "reach a lower loss"),
        (WEEKEND, "", "fewer than"),
    ],
)
def test_the_note_on_few_tokens_names_the_limit(request_, said, not_said):
    notes = total_notes(choose(request_))
    assert said in notes and not_said not in notes
    assert ("fewer than 20" in notes) == bool(said)


def test_the_smaller_model_of_the_note_has_the_lower_loss_that_it_says():
    request = replace(WEEKEND, hours=100, parameters=1e9)
    losses = re.search(r"lower loss, ([\d.]+) instead of ([\d.]+)", total_notes(choose(request)))
    better = choose(replace(request, parameters=None))
    found, _ = forecast_loss(better.fit.run.model.num_parameters, better.tokens)
    assert float(losses[1]) == pytest.approx(found, abs=0.01) and losses[1] < losses[2]


def test_the_memory_error_has_no_hours_in_it(monkeypatch):
    texts = set()
    for hours in (0.5, 48, 5000):
        with pytest.raises(ValueError, match="does not fit the memory") as error:
            choose(Request("rtx3060", 1, hours, parameters=7e9))
        texts.add(str(error.value))
    assert len(texts) == 1
    offered = float(texts.pop().split()[-1])
    assert choose(Request("rtx3060", 1, 5000, parameters=offered)).tokens
    with pytest.raises(ValueError, match="fit the memory"):
        choose(Request("rtx3060", 1, 5000, parameters=1.2 * offered))


# ---- memory: long rows, SFT and DPO


def plan_of(choice: Choice, tmp_path: Path, monkeypatch) -> tuple[Path, str]:
    """Write a plan as the command does; its folder and its text."""
    monkeypatch.chdir(tmp_path)
    files = gpu_files(choice, "mine")
    headers = plan_files.config_headers("mine", files, "about", choice.notes)
    plan_files.write_plan(Path("configs/mine"), files, headers)
    plan = load_plan("configs/mine/plan.yaml")
    request = choice.request
    report = forecast(plan, request.gpu, request.gpus)
    return Path("configs/mine"), gpu_text(choice, report, 2.0)


def test_long_rows_that_do_not_fit_are_named_in_the_text_and_the_configs(tmp_path, monkeypatch):
    choice = choose(replace(WEEKEND, hours=100, parameters=1e9))
    assert not choice.fit.long_rows and choice.fit.wanted_rows == 16_384
    folder, text = plan_of(choice, tmp_path, monkeypatch)
    said = "no long-context phase: rows of 16,384 tokens do not fit the memory"
    for written in (text, *((folder / name).read_text() for name in ("plan.yaml", "base.yaml"))):
        assert said in re.sub(r"\s+(# )?", " ", written)
    lines = (folder / "base.yaml").read_text().splitlines()
    assert all(len(line) <= 100 for line in lines if line.startswith("#"))
    assert yaml.safe_load((folder / "base.yaml").read_text())["run"] == "mine"
    assert "no long-context" not in total_notes(choose(WEEKEND))  # too small for one


def test_long_rows_may_have_more_activation_checkpointing(tmp_path, monkeypatch):
    choice = choose(Request("rtx3060", 1, 300, "base", parameters=3.7e8))
    run, longer = choice.fit.run, choice.fit.long_run
    levels = [run.parallel.activation_checkpointing, longer.parallel.activation_checkpointing]
    assert levels == sorted(set(levels), key=LEVELS.index) and len(levels) == 2
    folder, text = plan_of(choice, tmp_path, monkeypatch)
    written = [
        yaml.safe_load((folder / f"{phase}.yaml").read_text())["parallel"]
        for phase in ("base", "long_context", "gold")
    ]
    assert [part["activation_checkpointing"] for part in written] == [*levels, levels[0]]
    assert memory(longer, 1).total <= TIGHT * GPUS["rtx3060"].memory
    assert f"8,192 tokens at once, activation checkpointing {levels[1]}" in text


@pytest.mark.parametrize(("gpu", "gpus"), [("rtx3060", 1), ("laptop8", 2)])
def test_sft_and_dpo_fit_the_memory_of_every_chat_model(gpu, gpus, tmp_path, monkeypatch):
    largest = dial._largest(Request(gpu, gpus, 1))
    limit = TIGHT * GPUS[gpu].memory
    needs = {stage: memory(run, gpus).total for stage, run in largest.tuning.items()}
    assert set(needs) == {"sft", "dpo"} and max(needs.values()) <= limit
    pairs = largest.tuning["dpo"].data
    assert pairs.micro_batch_size >= 2 and pairs.sequence_length == 2048
    hours = 2 * largest.needed_tokens * largest.seconds_per_token / HOUR
    size = largest.run.model.num_parameters
    choice = choose(Request(gpu, gpus, hours, parameters=size))
    folder, text = plan_of(choice, tmp_path, monkeypatch)
    for stage, run in choice.fit.tuning.items():
        content = yaml.safe_load((folder / f"{stage}.yaml").read_text())
        assert content["data"]["micro_batch_size"] == run.data.micro_batch_size
        assert content["data"]["sequence_length"] == run.data.sequence_length
        level = run.parallel.activation_checkpointing
        assert content["parallel"]["activation_checkpointing"] == level
        assert f"{stage} {memory(run, gpus).total / 1e9:.1f}" in text
    assert "pairs of answers" in text and "reference model" in text


def test_a_chat_model_is_smaller_if_a_pair_does_not_fit():
    chat, base = (dial._largest(Request("rtx3060", 1, 1, goal)).run for goal in ("chat", "base"))
    assert chat.model.num_parameters < base.model.num_parameters
    assert dial_fit._tuning_runs(base, 1, GPUS["rtx3060"]) is None


def test_a_stage_reads_its_config_once(monkeypatch):
    choice, read = choose(WEEKEND), []
    real = plan_files.read_yaml
    monkeypatch.setattr(plan_files, "read_yaml", lambda path: read.append(path.name) or real(path))
    gpu_files(choice, "mine")
    assert sorted(read) == ["dpo.yaml", "nanollama_1b.yaml", "sft.yaml"]


# ---- time between checkpoints


@pytest.mark.parametrize(
    "request_",
    [
        WEEKEND,
        Request("laptop8", 1, 1),
        Request("rtx3060", 1, 300, "base", parameters=3.7e8),
        Request("h100", 2, 20),
    ],
)
def test_a_checkpoint_comes_every_15_to_30_minutes(request_):
    choice = choose(request_)
    fitted, gpu = choice.fit, GPUS[request_.gpu]
    files = gpu_files(choice, "mine")
    runs = {"base": fitted.run, "long_context": fitted.long_run, "gold": fitted.run}
    seconds = {name: phase_seconds(run, request_.gpus, gpu) for name, run in runs.items() if run}
    if request_.goal == "chat":
        pair = 4 * request_.gpus * plan_files.PAIR_TOKENS
        tokens = {"sft": fitted.tuning["sft"].data.tokens_per_step, "dpo": pair}
        seconds |= {stage: count * fitted.seconds_per_token for stage, count in tokens.items()}
    assert {f"{name}.yaml" for name in seconds} == files.keys() - {"plan.yaml", "data.yaml"}
    for name, step in seconds.items():
        content = files[f"{name}.yaml"]
        every = content["checkpoint"]["every"]
        short = content["steps"] >= 3 * every > content["steps"] - 3
        assert 15 <= every * step / 60 <= 30 or (short and every * step < 30 * 60), name
        assert content["validation"]["every"] % every == 0, name


@pytest.mark.parametrize("minutes", [5, 7, 30, 90])
def test_plans_for_the_cpu_have_a_few_checkpoints(minutes):
    probe = Probe(7_000, 2048 / 7_000, 60, 0.15, 4e11, 2e10, 2)
    choice = choose_cpu(minutes, "chat", probe, prepared=False)
    files = cpu_files(choice, "mine")
    for stage in ("base", "sft", "dpo"):
        assert files[f"{stage}.yaml"]["checkpoint"]["every"] <= files[f"{stage}.yaml"]["steps"] / 3
    assert save_seconds(choice) <= 20.5 * 60
    assert f"about every {save_seconds(choice):.0f} seconds" in cpu_text(choice, probe, 10, minutes)


# ---- gates


def test_gates_of_a_plan_for_code_are_on_code():
    choice = choose(Request("h100", 2, 60, "code"))
    final = sum(choice.steps.values())
    gates = {gate["metric"]: gate for gate in milestone_gates(choice, final)}
    assert next(iter(gates)) == "the_stack_python.bits_per_byte"
    size, read = choice.fit.run.model.num_parameters, read_tokens(choice, final)
    assert sum(read.values()) == pytest.approx(choice.tokens)
    assert read["the_stack_python"] == pytest.approx(choice.tokens / 2)
    # Web text is 41 % of the tokens: its limits may not be those of all tokens.
    web = gates["fineweb_edu.bits_per_byte"]
    assert web["go"] == pytest.approx(1.2 * forecast_bits(size, read["fineweb_edu"]), abs=1e-3)
    assert web["go"] > 1.15 * forecast_bits(size, choice.tokens)
    assert gates["the_stack_python.bits_per_byte"]["no_go"] < web["no_go"]
    assert "code.humaneval_pass@1" in gates
    plan = gpu_files(choice, "mine")["plan.yaml"]
    assert plan["phases"][-1]["milestones"][0]["evals"] == ["suite", "code"]
    assert "--tasks humaneval --run_code" in plan["evals"]["code"]
    early = [gate["metric"] for gate in milestone_gates(choice, choice.steps["base"])]
    assert "code.humaneval_pass@1" not in early


def test_small_plans_have_no_benchmarks_at_chance():
    choice = choose(Request("laptop8", 1, 3, "code"))
    metrics = [gate["metric"] for gate in milestone_gates(choice, sum(choice.steps.values()))]
    assert metrics == ["the_stack_python.bits_per_byte", "fineweb_edu.bits_per_byte"]
    assert list(gpu_files(choice, "mine")["plan.yaml"]["evals"]) == ["suite"]


def test_gates_of_a_plan_for_text_are_on_web_text():
    choice = choose(WEEKEND)
    web, hellaswag = milestone_gates(choice, sum(choice.steps.values()))
    assert (web["metric"], hellaswag["metric"]) == (
        "fineweb_edu.bits_per_byte",
        "hellaswag.acc_norm",
    )
    size = choice.fit.run.model.num_parameters
    assert web["go"] == pytest.approx(1.08 * forecast_bits(size, 0.9 * choice.tokens), abs=2e-3)


# ---- data: gated sources, amounts, disk, epochs


@pytest.mark.parametrize("goal", GOALS)
def test_a_gated_source_is_announced_before_anything_is_written(
    goal, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = ["--gpu", "laptop8", "--hours", "3", "--goal", goal, "--name", "mine"]
    monkeypatch.setattr(sys, "argv", ["x", *flags])

    def stop(*_: object) -> None:
        raise ValueError("nothing is written yet")

    with monkeypatch.context() as patch:
        patch.setattr(new_plan, "write_plan", stop)
        assert "nothing is written yet" in complaint_of(new_plan.main, flags, capsys, monkeypatch)
    assert not Path("configs").exists()
    new_plan.main()
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    gated = any(HUB_SOURCES[name].gated for name in source_shares(goal, 1))
    assert gated == (goal == "code")
    said = "the_stack_python is gated: before you run the plan, log in to the hub, accept the terms"
    assert text.startswith(f"note: {said}") == gated
    assert ("a plan of --goal chat or --goal base needs no login" in text) == gated
    header = re.sub(r"\s+(# )?", " ", Path("configs/mine/plan.yaml").read_text())
    assert (said in header) == gated


def test_rounding_is_to_one_side():
    for number in (1.0, 9.999e9, 5.777e9, 1.234567e8, 5.78e9, 99_999.0, 0.0123):
        for digits in (2, 3):
            up, down = round_up(number, digits), round_down(number, digits)
            assert down <= number <= up
            assert up - down <= number * 1.001 * 10 ** (1 - digits)
    assert (round_up(5.78e9, 3), round_up(5.781e9, 3), round_down(9.99e8)) == (
        5.78e9,
        5.79e9,
        9.9e8,
    )


@pytest.mark.parametrize("hours", [1.7, 48])
def test_downloads_cover_the_need_as_printed_and_written(hours, tmp_path, monkeypatch):
    choice = choose(replace(WEEKEND, hours=hours))
    need = read_tokens(choice, sum(choice.steps.values()))
    commands = " ".join(gpu_files(choice, "mine")["plan.yaml"]["before"].values())
    written = {
        name: float(limit)
        for name, limit in re.findall(r"--dataset (\w+) --max_tokens (\S+)", commands)
    }
    assert written == choice.downloads
    assert need.keys() == written.keys()
    for name, tokens in need.items():
        assert 1.1 * tokens <= written[name] <= 1.012 * 1.1 * tokens
    _, text = plan_of(choice, tmp_path, monkeypatch)
    printed = re.sub(r"\s+", " ", text)
    for name, tokens in written.items():
        amount, unit = re.search(rf"{name} ([\d.]+)([BM])[, ]", printed).groups()
        assert float(amount) * {"B": 1e9, "M": 1e6}[unit] == pytest.approx(tokens)


def test_downloads_are_at_most_what_there_is():
    shares = phase_shares(16_384).items()
    tokens = download_tokens("code", {phase: 60e9 * share for phase, share in shares})
    assert tokens["the_stack_python"] == 8e9 and tokens["stackexchange"] == 1.1e9


@pytest.fixture
def phases(tmp_path, text_store):
    """Write the configs of phases: (name, steps, data settings) -> PlanPhase."""

    def write(*parts: tuple[str, int, dict]) -> tuple[PlanPhase, ...]:
        total = sum(steps for _, steps, _ in parts)
        for name, steps, data in parts:
            content = yaml.safe_load((ROOT / "configs" / "test_mode.yaml").read_text())
            content["data"] |= {"store": str(text_store), "tokens_per_step": 2048} | data
            schedule = {"warmup_steps": 2, "total_steps": total, "decay_steps": 4}
            content |= {"phase": name, "steps": steps, "schedule": schedule}
            content["model"]["vocab_size"] = VOCAB
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        return tuple(PlanPhase(str(tmp_path / f"{name}.yaml")) for name, *_ in parts)

    return write


def test_repeated_epochs_take_no_disk(phases, text_store):
    one = phases(("one", 50, {"mix": {"first": 1, "second": 1}}))

    def tokens(before: dict[str, str], counted: bool = False) -> float:
        readable = readable_tokens if counted else None
        disk = forecast(Plan("p", one, before=before), "h100", 1, training_tokens_of=readable)
        assert disk["disk"]["text"] == 2 * disk["disk"]["tokens"]  # 4 bytes and 2 per token
        return disk["disk"]["tokens"] / 2

    trained = 50 * 2048
    load = "python -m scripts.download_data --output_dir x --dataset"
    assert tokens({}) == trained  # unknown: at most what it reads
    assert tokens({"a": f"{load} first --max_tokens 1e4"}) == 1e4 + trained / 2
    assert tokens({"a": f"{load} first second --max_tokens 1e4"}) == 2e4
    assert tokens({"a": f"{load} first --max_tokens 1e6"}) == 1e6 + trained / 2
    group = f"{load} pg19_and_stack_mixed --max_tokens 1e9"  # of each of its two sources
    assert tokens({"a": group}) == 2e9 + trained
    shards = open_shards(text_store, {"first": 1, "second": 1}, "train", VOCAB)
    stored = sum(len(source) for source in shards.values())
    assert tokens({}, counted=True) == stored != trained


def test_a_plan_with_repeated_text_has_the_disk_of_its_downloads(tmp_path, monkeypatch):
    choice = choose(Request("h100", 8, 2000, "code", parameters=4e8))
    folder, _ = plan_of(choice, tmp_path, monkeypatch)
    disk = forecast(load_plan(folder / "plan.yaml"), "h100", 8)["disk"]
    downloaded = sum(choice.downloads.values())
    assert disk["text"] == pytest.approx(4 * downloaded) and downloaded < 0.8 * choice.tokens


def test_the_hint_to_continue_names_the_first_unread_epoch(phases, text_store):
    mix = {"mix": {"first": 1}}
    readable = len(open_shards(text_store, {"first": 1.0}, "train", VOCAB)["first"])
    step = 2048 / readable

    def hints(*parts: tuple[str, int, dict]) -> list[float]:
        plan = Plan("p", phases(*parts))
        report = forecast(plan, "h100", 1, training_tokens_of=readable_tokens)
        found = re.findall(r"data\.start_epoch\.first=(\S+) continues", forecast_text(report))
        return [float(epoch) for epoch in found]

    again = [("one", 10, mix), ("two", 4, mix), ("three", 5, mix)]
    assert hints(*again) == pytest.approx([10 * step, 10 * step])  # "two" read nothing new
    longer = [("one", 4, mix), ("two", 10, mix), ("three", 5, mix)]
    assert hints(*longer) == pytest.approx([4 * step, 10 * step])
    goes_on = {**mix, "start_epoch": {"first": 10 * step}}
    continued = [("one", 10, mix), ("two", 4, goes_on), ("three", 5, mix)]
    assert hints(*continued) == pytest.approx([14 * step])


# ---- names


@pytest.mark.parametrize(
    "name",
    ["nanollama_1b", "chat", "quickstart", "plan_1b", "speedrun", "lab", "data", "test_mode"],
)
def test_names_of_the_project_are_refused(name, tmp_path, monkeypatch):
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        with pytest.raises(ValueError, match=r"use another --name") as error:
            check_name(name)
        assert "configs/" in str(error.value) and "\n" not in str(error.value)
        assert ("scripts.pipeline" in str(error.value)) == (
            folder == ROOT and (ROOT / "configs" / name / "plan.yaml").exists()
        )


def test_names_of_other_runs_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_name("mine")
    for output in plan_files.OUTPUTS:
        (tmp_path / output / "mine").mkdir(parents=True)
        with pytest.raises(ValueError, match=f"mine is in use: {output}/mine exists; use another"):
            check_name("mine")
        (tmp_path / output / "mine").rmdir()
    (tmp_path / "configs" / "other").mkdir(parents=True)
    text = "run: mine\n"
    (tmp_path / "configs" / "other" / "base.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"mine is in use by configs/other/base.yaml"):
        check_name("mine")
    for flags in (["--gpu", "cpu", "--minutes", "5"], ["--gpu", "h100", "--hours", "5"]):
        said = complaint_of(new_plan.main, [*flags, "--name", "mine"], capsys, monkeypatch)
        assert "mine is in use by" in said
    assert [path.name for path in (tmp_path / "configs").iterdir()] == ["other"]

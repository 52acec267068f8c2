"""The speedrun ladder: its configs, three steps of each rung, also on more ranks, and its page."""

import json
import math
import os
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

from data.bin_loader import BinLoader
from data.bin_shards import BinShards, write_bin
from lab import learning_path as page
from lab.experiment import make_trial
from lab.ladder import FULL, MEDIUM, MINIATURE, ladder_experiment, read_ladder, select_rungs
from lab.run import plan_trials
from models.moe import MoEConfig
from scripts import ladder as command
from training import loop, setup
from training.config import to_dict
from training.curves import OF_LOADER
from training.loop import backward, reduce
from training.objectives import next_token
from training.schedulers import apply_schedules, of_step, run_schedules
from training.settings import load_settings
from training.speedrun import SpeedrunRun

RUNGS = {folder: read_ladder(folder) for folder in (FULL, MINIATURE, MEDIUM)}
SMALL = [rung.name for rung in RUNGS[MINIATURE]]
WITHOUT_MINIATURE = {"05_padded_vocab", "24_fp8_head"}  # no effect at 4,096 tokens; a GPU
RECORDS = 89  # of track 1
pytestmark = pytest.mark.usefixtures("yaml_read_once")
LENGTH, VOCAB, STEPS = 64, 512, 3
LOSSES = Path(__file__).with_name("ladder_losses.json")  # of the third step of each rung
# Together these rungs have every setting of the ladder, because a rung keeps those of the one
# before; values of rates and windows differ.
LAST_OF_A_KIND = (
    *("01_tuned_rate", "03_rms_norm", "09_wide_heads", "16_double_rate", "19_value_embeddings"),
    *("22_drop_attention", "30_attention_gate", "35_polar_express", "39_cautious_decay"),
    *("43_multi_token", "49_bigram_signs"),
)


def load(rung) -> SpeedrunRun:
    return load_path(rung.path)


@cache
def load_path(path: Path) -> SpeedrunRun:
    return load_settings(SpeedrunRun, path)


# ---- configs


@pytest.mark.parametrize("folder", RUNGS, ids=str)
def test_each_rung_extends_the_one_before_and_begins_with_its_command(folder):
    rungs = RUNGS[folder]
    entry = "train_gpt_medium.py" if folder == MEDIUM else "train_gpt.py"
    for before, rung in zip([None, *rungs], rungs, strict=False):
        run = load(rung)
        assert run.steps == run.schedule.total_steps
        assert rung.text.startswith(f"# python {entry} --config {rung.path}\n")
        if folder != MEDIUM and before is not None:
            assert rung.values["extends"] == before.path.name
            assert rung.changes
    assert load_settings(SpeedrunRun, folder / "current.yaml") == load(rungs[-1])


def settings(rung) -> set[str]:
    """The settings that a rung changes, without its length and learning rates."""
    keys = set()
    for section, values in rung.changes.items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            inner = value if section == "schedules" or name == "groups" else {"": value}
            keys |= {f"{section}.{name}.{key}" for key in inner}
    return keys


def test_a_miniature_rung_changes_the_settings_of_its_full_size_twin():
    full = {rung.name: rung for rung in RUNGS[FULL]}
    assert set(full) - set(SMALL) == WITHOUT_MINIATURE
    for rung in RUNGS[MINIATURE][1:]:
        fits = {"data.micro_batch_size."}  # a matter of memory
        assert settings(rung) - fits == settings(full[rung.name]) - fits, rung.name
        for section, values in rung.changes.items():
            for name, value in values.items() if isinstance(values, dict) else []:
                twin = full[rung.name].changes[section].get(name)
                if isinstance(value, (bool, str)):
                    assert value == twin or name == "window_pattern"


def test_the_rungs_on_two_ranks_have_every_setting():
    def flat(values: dict, prefix: str = "") -> dict:
        pairs = {}
        for key, value in values.items():
            nested = isinstance(value, dict)
            pairs |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
        return pairs

    runs = {rung.name: flat(to_dict(load(rung))) for rung in RUNGS[MINIATURE]}
    baseline = runs["00_baseline"]
    set_on_two_ranks = {
        key
        for name in LAST_OF_A_KIND
        for key, value in runs[name].items()
        if value != baseline.get(key)
    }
    for name, values in runs.items():
        changed = {key for key, value in values.items() if value != baseline.get(key)}
        assert changed <= set_on_two_ranks, name


def test_sizes_and_tokens_are_those_of_the_records():
    sizes = {rung.name: load(rung).model.num_parameters for rung in RUNGS[FULL]}
    assert sizes["00_baseline"] == 124_439_808  # GPT-2
    # Record 8: an untied head of 50,304 x 768
    assert sizes["10_untied_head"] - sizes["09_wide_heads"] == 50_304 * 768
    assert sizes["19_value_embeddings"] - sizes["18_window_warmup"] == 12 * (50_304 * 768 + 2)
    assert load(RUNGS[MEDIUM][0]).model.num_parameters == 354_823_168  # GPT-2 medium
    baseline = load(RUNGS[FULL][0])
    assert baseline.steps * baseline.data.tokens_per_step == 10_255_073_280  # llm.c's log
    assert (baseline.target_loss, load(RUNGS[MEDIUM][0]).target_loss) == (3.28, 2.92)


def test_every_record_is_a_rung_or_listed():
    cited = ", ".join(
        [rung.facts["Record"] for rung in RUNGS[FULL]]
        + [records for records, _ in page.SYSTEMS]
        + [record for record, *_ in page.ABSENT if record.isdigit()]
    )
    assert {int(number) for number in re.findall(r"\d+", cited)} == set(range(1, RECORDS + 1))


# ---- three steps of every rung


def shrunk(rung, data: Path) -> SpeedrunRun:
    """A miniature rung in float32, of hidden size 64, in micro-batches of eight rows of 64 tokens.

    Once zero_init has had its rung, it is off: what a zero projection hides would not be compared.
    """
    run = load(rung)
    scale = LENGTH / run.data.sequence_length

    def scaled(value):
        return None if value is None else max(1, round(value * scale))

    windows = {name: scaled(getattr(run.model, name)) for name in ("long_window", "short_window")}
    heads = run.model.num_attention_heads
    model = replace(run.model, vocab_size=VOCAB, hidden_size=64, head_dim=64 // heads, **windows)
    curves = {
        name: replace(
            curve,
            points=tuple(
                (x, value / 4 if name == "batch_tokens" else scaled(value))
                for x, value in curve.points
            ),
        )
        if name in (*windows, "batch_tokens")
        else curve
        for name, curve in run.schedules.items()
    }
    return replace(
        run,
        steps=STEPS,
        model=replace(
            model,
            max_position_embeddings=LENGTH,
            zero_init=model.zero_init and rung.number < 10,
        ),
        data=replace(
            run.data,
            train=str(data),
            sequence_length=LENGTH,
            micro_batch_size=8,
            tokens_per_step=run.data.tokens_per_step // 4,
            max_document=scaled(run.data.max_document),
        ),
        optim=replace(run.optim, muon_dtype="auto"),
        schedule=replace(run.schedule, total_steps=STEPS, warmup_steps=0, decay_steps=2),
        schedules=curves,
        parallel=replace(run.parallel, dtype="float32"),
    )


def with_experts(run: SpeedrunRun) -> SpeedrunRun:
    """One step of a rung with four experts."""
    moe = MoEConfig(experts=4, router="noisy_top_k")
    return replace(run, steps=1, model=replace(run.model, kind="moe", moe=moe))


def write_shard(path: Path) -> None:
    """Documents of random lengths whose tokens follow the one before, with noise."""
    rng, tokens = np.random.default_rng(0), [0]
    for _ in range(20_000):
        noise = int(rng.zipf(1.5)) % (VOCAB - 1)
        new_document = rng.random() < 0.02
        tokens.append(0 if new_document else 1 + (7 * tokens[-1] + noise) % (VOCAB - 1))
    write_bin(path, np.array(tokens, dtype="<u2"))


def train_steps(run: SpeedrunRun, rank: int, world: int) -> list[float]:
    """The loss of each step, with the parts of a real run; NaN if tokens of experts are missing."""
    shards = BinShards(run.data.train, VOCAB, run.data.bos_token)
    loader = BinLoader(
        shards,
        of_step(run, "batch_tokens", run.data.tokens_per_step),
        run.data.sequence_length,
        rank,
        world,
        run.data.micro_batch_size * run.data.sequence_length,
        run.data.alignment,
        run.data.max_document,
        run.data.document_mask,
    )
    state = setup.build(run, torch.device("cpu"))
    schedules = run_schedules(run, state, OF_LOADER)
    state.model.train()
    losses = []
    for number in range(run.steps):
        apply_schedules(schedules, number)
        step = loader.at(number)
        sums, _ = backward(run, state.model, step, next_token(0.0))
        means, *_ = reduce(sums, step.loss_denominator)
        state.optimizer.step()
        state.optimizer.zero_grad()
        losses.append(math.nan if means.get("dropped_tokens") else means["loss"])
    return losses


def climb(rank: int, world: int, folder: Path, runs: dict[str, SpeedrunRun]) -> None:
    """Write the losses of these rungs to <folder>/<world>.json. One rank does not shard."""
    if world == 1:
        setup.wrap_model_fsdp = lambda model, *_: model
        loop.set_last_micro_batch = lambda *_: None
    store = dist.FileStore(str(folder / f"store{world}"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    losses = {name: train_steps(run, rank, world) for name, run in runs.items()}
    if rank == 0:
        (folder / f"{world}.json").write_text(json.dumps(losses), encoding="utf-8")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort at exit


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Losses of rungs without sharding and on 2 and 4 ranks: world size -> rung -> three losses."""
    folder = tmp_path_factory.mktemp("ladder")
    write_shard(folder / "train.bin")
    # Later rungs have fewer than four rows in their first step.
    worlds = {1: SMALL, 2: LAST_OF_A_KIND, 4: ["03_rms_norm", "39_cautious_decay"]}
    runs = {rung.name: shrunk(rung, folder / "train.bin") for rung in RUNGS[MINIATURE]}
    result = {}
    for world, names in worlds.items():
        chosen = {name: runs[name] for name in names}
        if world == 1:
            chosen |= {f"{name} with experts": with_experts(runs[name]) for name in names}
        processes = [
            forked.forkserver().Process(target=climb, args=(rank, world, folder, chosen))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * world
        result[world] = json.loads((folder / f"{world}.json").read_text(encoding="utf-8"))
    return result


def test_golden_losses(losses, tmp_path):
    golden = json.loads(LOSSES.read_text(encoding="utf-8"))
    actual = {name: round(losses[1][name][-1], 6) for name in SMALL}
    new = tmp_path / LOSSES.name
    new.write_text(json.dumps(actual, indent=1) + "\n", encoding="utf-8")
    assert actual == pytest.approx(golden, abs=1e-5), f"if the change is intended, take {new}"
    # Each rung differs from the one before
    assert list(golden) == SMALL and len(set(golden.values())) == len(golden)


def test_every_rung_trains_with_experts(losses):
    for name in SMALL:
        [loss] = losses[1][f"{name} with experts"]
        assert 0 < loss < 2 * losses[1][name][0], name


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_train_the_same_steps(losses, world):
    for name, values in losses[world].items():
        assert values == pytest.approx(losses[1][name], abs=1e-5), name


# ---- the command


@pytest.fixture
def run_ladder(monkeypatch, capsys):
    """Run the command; return its exit status and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ladder.py", *map(str, arguments)])
        status = 0
        try:
            command.main()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_rungs_are_selected_by_number_range_and_name():
    ladder = RUNGS[MINIATURE]

    def select(*words):
        return [rung.name for rung in select_rungs(ladder, words)]

    assert select() == SMALL
    assert select("3-6") == ["00_baseline", "03_rms_norm", "04_muon", "06_relu2"]
    assert select("smear,4", "10_untied_head") == [
        "00_baseline",
        "04_muon",
        "10_untied_head",
        "33_smear",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rungs", "muom"], "no such rung; nearest: 04_muon"),
        (["--rungs", "5"], "nearest: 03_rms_norm, 04_muon, 06_relu2"),
        (["--rungs", "60-70"], "nearest: 47_bigram_embedding, 48_separate_values, 49_bigram_signs"),
        (["--medium", "--miniature"], "give one"),
        (["--seeds", "0"], "at least 1"),
    ],
)
def test_a_wrong_request_gets_one_sentence(run_ladder, arguments, message):
    status, printed = run_ladder("--miniature", *arguments)
    assert status == 2 and printed.startswith("error: ") and message in printed
    assert printed.count("\n") == 1


def test_runs_keep_the_steps_of_their_configs():
    experiment = ladder_experiment(MINIATURE, RUNGS[MINIATURE][:3], seeds=2)
    for variant, rung in zip(experiment.variants, RUNGS[MINIATURE], strict=False):
        trial = make_trial(experiment, variant, seed=1)
        run, original = (
            load_settings(SpeedrunRun, trial.words[3], list(trial.words[4:])),
            load(rung),
        )
        assert (run.steps, run.schedule, run.seed) == (original.steps, original.schedule, 1)


def test_a_record_compares_each_rung_with_the_baseline_and_the_one_before(
    tmp_path, monkeypatch, run_ladder
):
    """Logs of three rungs, as runs write them, give the ratios that they were made with."""
    monkeypatch.chdir(tmp_path)
    speed = {"00_baseline": 1.0, "04_muon": 2.0, "10_untied_head": 1.6}
    rungs = select_rungs(RUNGS[MINIATURE], ["4", "10"])
    experiment = ladder_experiment(MINIATURE, rungs, seeds=3)
    for trial in plan_trials(experiment, list(experiment.variants), experiment.seeds):
        trial.folder.mkdir(parents=True)
        state = {"identity": trial.identity, "status": "finished"}
        (trial.folder / "trial.json").write_text(json.dumps(state), encoding="utf-8")
        factor = speed[trial.variant] * (1 + 0.01 * (trial.seed - 1))
        rows = [
            {"step": i, "tokens": 100 * i, "step_s": 0.1, "val/loss": 6 - 2 * i * factor / 100}
            for i in range(1, 101)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (trial.folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    status, printed = run_ladder("--miniature", "--rungs", "muon", "10", "--report_only")
    assert status == 0, printed
    [record] = Path("records").glob("*_ladder_miniature")
    result = json.loads((record / "result.json").read_text(encoding="utf-8"))
    ratios = {
        variant["name"]: (variant["ratio"]["tokens"], variant["previous_ratio"]["tokens"])
        for variant in result["variants"]
    }
    assert ratios["00_baseline"] == (None, None)
    assert ratios["04_muon"][0]["mean"] == pytest.approx(0.5, rel=0.01)
    assert ratios["10_untied_head"][0]["mean"] == pytest.approx(1 / 1.6, rel=0.01)
    assert ratios["10_untied_head"][1]["mean"] == pytest.approx(2 / 1.6, rel=0.01)
    text = (record / "README.md").read_text(encoding="utf-8")
    assert (
        "- helps (fewer tokens): 04_muon.\n- does not help (more tokens): 10_untied_head." in text
    )
    learned = page.learning_path(Path("records"))
    assert "tokens to loss 4.000; 0.50 [0.49, 0.51] of the baseline" in learned


def test_the_learning_path_is_current_and_its_code_exists():
    written = page.PAGE.read_text(encoding="utf-8")
    assert page.learning_path(ROOT / "records") == written, "run scripts.ladder --history"
    milestones = {rung.facts["Milestone"] for rung in RUNGS[FULL]}
    assert len(milestones) == len(page.REACHED)
    for rung in RUNGS[FULL]:
        assert page.code_of(rung), rung.name

"""DPO: losses equal TRL's; cached reference scores; ranks, micro-batches and restarts."""

import json
import math
import random
import shutil
import sys
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT, one_thread, random_word, read_metrics
from safetensors.torch import load_file, save_file

from benchmarks import parity_dpo
from data.pipeline.recipe import Split
from models.hf import load_hf
from training import setup
from training.preference_losses import DPOConfig, preference
from training.settings import load_settings


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("case")
    parity_dpo.write_case(folder)
    rng = random.Random(0)
    word = partial(random_word, rng)
    rows = (
        f'{{"prompt": "{word(30)}", "chosen": "yes {word(60)}", "rejected": "no {word(60)}"}}\n'
        for _ in range(40)
    )
    (folder / "many.jsonl").write_text("".join(rows))
    return folder


def test_losses_metrics_and_gradients_equal_trl(tmp_path):
    pytest.importorskip("trl", reason="needs requirements-parity.txt")
    for label, difference in parity_dpo.compare(tmp_path).items():
        for name, value in difference["trl"].items():
            tolerance = 1e-4 if name == "grad_norm" else 1e-5
            assert difference["ours"][name] == pytest.approx(value, rel=tolerance, abs=1e-5), (
                label,
                name,
            )


def test_policy_equal_to_reference_and_answers_swapped(tmp_path):
    pairs = parity_dpo.write_case(tmp_path)
    policy, reference = load_hf(tmp_path / "policy"), load_hf(tmp_path / "reference")
    sums = preference(DPOConfig())(policy, parity_dpo.batch_of(pairs, policy))[1]
    assert float(sums["loss"]) == pytest.approx(4 * math.log(2), rel=1e-6)
    assert {
        float(sums[name])
        for name in ("rewards/accuracies", "rewards/margins", "kl_per_token", "drift_per_token")
    } == {0.0}
    batch = parity_dpo.batch_of(pairs, reference)
    swapped = batch._replace(
        answer_positions=batch.answer_positions.roll(4, 0), reference=batch.reference.roll(4)
    )
    straight, turned = (preference(DPOConfig())(policy, one)[1] for one in (batch, swapped))
    assert float(turned["rewards/margins"]) == -float(straight["rewards/margins"]) != 0
    assert float(turned["rewards/accuracies"]) == 4 - float(straight["rewards/accuracies"])
    assert float(turned["lengths/delta"]) == -float(straight["lengths/delta"])
    half = batch._replace(counted=torch.tensor([1.0, 0.0, 0.0, 1.0]))
    alone = [
        preference(DPOConfig())(policy, parity_dpo.batch_of(pairs, reference, range(i, i + 1)))[1]
        for i in (0, 3)
    ]
    for name, value in preference(DPOConfig())(policy, half)[1].items():
        assert float(value) == pytest.approx(
            sum(float(one[name]) for one in alone), rel=1e-4, abs=1e-6
        ), name


def test_without_a_reference_rewards_are_log_probabilities(tmp_path):
    pairs = parity_dpo.write_case(tmp_path)
    policy, batch = load_hf(tmp_path / "policy"), parity_dpo.batch_of(pairs, None)
    sums = preference(DPOConfig(reference="none"))(policy, batch)[1]
    assert float(sums["rewards/chosen"]) == pytest.approx(
        0.1 * float(sums["logps/chosen"]), rel=1e-6
    )
    assert "kl_per_token" not in sums and DPOConfig(loss="simpo").resolved_reference == "none"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0}, "dpo.beta=0 must be above 0"),
        ({"loss": "dpo"}, "dpo.loss='dpo' is not one of sigmoid"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "has no effect with dpo.loss=ipo"),
        ({"sft_weight": -1}, "must not be negative"),
        ({"reference": "disk"}, "is not one of precomputed"),
        ({"loss": "simpo", "reference": "cpu"}, "has no reference"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**settings)


def settings(case: Path, where: Path, *more: str) -> list[str]:
    """Return overrides for six steps of configs/dpo.yaml on the case's pairs, output in `where`."""
    return [
        f"preferences={{sources: {{many: {{path: {case / 'many.jsonl'}}}}}, "
        f"cache: {case / 'cache'}, val_fraction: 0.2}}",
        "data={mix: {many: 1}, sequence_length: 256, pairs_per_step: 4, micro_batch_size: 8}",
        f"init_from={case / 'policy'}",
        "steps=6",
        "optim={lr: 1e-3, weight_decay: 0, z_weight: 0}",
        "parallel={dtype: float32}",
        "checkpoint={every: 3, asynchronous: false}",
        "validation={every: 3, rows: 5}",
        f"log_dir={where / 'logs'}",
        f"output_dir={where / 'out'}",
        *more,
    ]


def dpo_here(*overrides: str) -> bool:
    from train_dpo import PreferenceRun, align

    run = load_settings(PreferenceRun, ROOT / "configs" / "dpo.yaml", list(overrides))
    with setup.ranks() as device:
        return align(run, 0, 1, device) == 0


def test_ranks_micro_batches_restarts_and_the_kind_of_reference_change_nothing(case, tmp_path):
    uninterrupted, split, paused, cpu = (
        tmp_path / name for name in ("whole", "split", "paused", "cpu")
    )
    assert dpo_here(*settings(case, uninterrupted))
    launch = [
        sys.executable,
        "-m",
        "scripts.launch",
        "--nproc_per_node=2",
        str(ROOT / "train_dpo.py"),
        "--batch_size",
        "4",
    ]
    command = [
        *launch,
        "--config",
        str(ROOT / "configs" / "dpo.yaml"),
        *settings(case, split, "data.micro_batch_size=2"),
    ]
    done = forked.run(command, env=one_thread())
    assert done.returncode == 0, done.stderr
    dpo_here(*settings(case, paused, "until=3"))
    reference_bytes = (paused / "out" / "reference.safetensors").read_bytes()
    dpo_here(*settings(case, paused))
    assert (paused / "out" / "reference.safetensors").read_bytes() == reference_bytes
    assert dpo_here(*settings(case, cpu, "dpo.reference=cpu", "data.micro_batch_size=4"))
    assert not (cpu / "out" / "reference.safetensors").exists()
    one, two, again, frozen = (
        read_metrics(folder / "logs") for folder in (uninterrupted, split, paused, cpu)
    )
    assert (
        one[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
        and one[0]["rewards/accuracies"] == 0 == one[0]["drift_per_token"]
    )
    assert one[-1]["rewards/margins"] > 0.05 and "val/rewards/accuracies" in one[-1]
    for key in (
        key
        for key in one[-1]
        if key.startswith(("loss", "grad_norm", "rewards", "logps", "lengths", "kl", "val/"))
    ):
        if key == "rewards/accuracies":
            continue  # of the first step, where rewards differ only by rounding
        expected = [row[key] for row in one if key in row]
        assert [row[key] for row in again if key in row] == expected, key  # bit for bit
        for other in (two, frozen):
            assert [row[key] for row in other if key in row] == pytest.approx(
                expected, abs=1e-4, rel=1e-5
            ), key
            if "logps" not in key:
                assert [row[key] for row in other if key in row] == pytest.approx(
                    expected, abs=2e-5, rel=1e-5
                ), key
    weights = [
        (folder / "out" / "step_6" / "model.safetensors").read_bytes()
        for folder in (uninterrupted, paused)
    ]
    assert weights[0] == weights[1]


def test_a_kept_reference_is_refused_for_anything_else(case, tmp_path):
    cache = tmp_path / "reference.safetensors"
    cached = f"dpo.reference_cache={cache}"
    dpo_here(*settings(case, tmp_path / "a", cached, "steps=2"))
    scores = load_file(cache)
    assert set(scores) == {"train/many", "val/many"}
    assert (
        int((~scores["train/many"].isnan()).all(1).sum()) == 8
        and not scores["val/many"].isnan().any()
    )
    dpo_here(*settings(case, tmp_path / "b", cached, "steps=3"))  # another source is added
    more = load_file(cache)
    known = ~scores["train/many"].isnan()
    assert int((~more["train/many"].isnan()).all(1).sum()) == 12 and torch.equal(
        more["train/many"][known], scores["train/many"][known]
    )
    turned = shutil.copytree(case / "policy", tmp_path / "turned")  # the same weights
    config = (turned / "config.json").read_text()
    (turned / "config.json").write_text(
        config.replace('"rope_theta": 10000.0', '"rope_theta": 10.0')
    )
    edited = tmp_path / "edited.jsonl"  # in a validation pair
    rows = [json.loads(line) for line in (case / "many.jsonl").read_text().splitlines()]

    def held_out(row):
        return (
            Split(0.2).of(json.dumps([[{"role": "user", "content": row["prompt"].strip()}], []]))
            == "val"
        )

    next(row for row in rows if held_out(row))["chosen"] += " indeed"
    edited.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for changes, message in (
        (f"init_from={case / 'reference'}", "computed with different inputs: weights; remove it"),
        ("data.sequence_length=250", "computed with different inputs: length; remove it"),
        ("parallel.dtype=bfloat16", "computed with different inputs: dtype"),
        ("preferences.system=Be kind.", "computed with different inputs: data"),
        (f"init_from={turned}", "computed with different inputs: model; remove it"),
        (f"preferences.sources.many.path={edited}", "computed with different inputs: data"),
    ):
        with pytest.raises(ValueError, match=message):
            dpo_here(*settings(case, tmp_path / "c", cached, "steps=2", changes))
    metadata = read_header(cache)
    more["val/many"][0] += 1
    save_file(more, cache, metadata)
    with pytest.raises(ValueError, match="is damaged: its checksum does not match"):
        dpo_here(*settings(case, tmp_path / "c", cached, "steps=2"))
    cache.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a readable file of reference log-probabilities"):
        dpo_here(*settings(case, tmp_path / "c", cached, "steps=2"))


def read_header(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["init_from=nowhere"], "nowhere has no complete checkpoint"),
        ([f"dpo.reference_cache={ROOT}"], "is a folder; name a file in it as dpo.reference_cache"),
        (["data.mix={}"], "data.mix is empty; list at least one of preferences.sources: many"),
        (
            ["preferences.sources.many.limit=0"],
            "preferences.sources.many.limit=0 must be at least 1; leave it out to take all",
        ),
        (["dpo.beta=nan"], "dpo.beta='nan' must be a finite number"),
        (
            ["data.mix={others: 1}"],
            "data.mix.others: preferences.sources has no such source; available: many",
        ),
        (["data.sequence_length=2048"], "exceeds the model's context"),
        (
            ["data.sequence_length=16"],
            "has no usable pair .* x a pair that does not fit",
        ),
        (["dpo.beta=-1"], "dpo.beta=-1 must be above 0"),
        (
            ["data.micro_batch_size=6"],
            "4 pairs per step do not divide over 1 rank.* with micro-batches of 3",
        ),
        (["data.pairs_per_step=0"], "data.pairs_per_step=0 must be at least 1"),
    ],
)
def test_mistakes_end_in_one_sentence(case, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        dpo_here(*settings(case, tmp_path, *more))

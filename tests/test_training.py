"""Training end to end: the same numbers on any number of ranks, and after any interruption."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_metrics, train_here, train_ranks
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tokenizers.bpe import load_tokenizer
from models.hf import load_hf
from models.nanollama import TransformerBlock


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def whole_state(step_folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Return every full tensor of a checkpoint's state, for any number of ranks."""
    dcp_to_torch_save(step_folder / "state", scratch)
    content = torch.load(scratch, weights_only=True)
    flat = {f"model {name}": value for name, value in content["model"].items()}
    for name, values in content["optimizer"]["state"].items():
        flat |= {f"{kind} {name}": value for kind, value in values.items()}
    return flat


def same_state(a: Path, b: Path, tmp_path: Path) -> bool:
    first_state, two = whole_state(a, tmp_path / "a.pt"), whole_state(b, tmp_path / "b.pt")
    assert (
        first_state.keys() == two.keys()
        and sum(name.startswith("exp_avg ") for name in first_state) > 10
    )
    position = [json.loads((folder / "state" / "trainer.json").read_text()) for folder in (a, b)]
    assert (
        position[0]["step"] == position[1]["step"]
        and position[0]["batch_index"] == position[1]["batch_index"]
    )
    return all(torch.equal(first_state[name], two[name]) for name in first_state)


def test_loss_does_not_depend_on_micro_batches_or_ranks(settings, tmp_path):
    curves = {}
    for micro in (1, 2, 4):
        where = f"log_dir={tmp_path / f'one-{micro}'}"
        assert train_here(
            settings(
                where,
                f"data.micro_batch_size={micro}",
                f"output_dir={tmp_path / f'c1{micro}'}",
                "checkpoint.every=6",
            )
        )
        curves[1, micro] = losses(tmp_path / f"one-{micro}")
    for micro, strategy in ((1, "zero2"), (2, "ddp"), (4, "zero3")):
        where = f"log_dir={tmp_path / f'two-{micro}'}"
        more = (
            where,
            f"data.micro_batch_size={micro}",
            f"parallel.strategy={strategy}",
            f"output_dir={tmp_path / f'c2{micro}'}",
            "checkpoint.every=6",
        )
        done = train_ranks(settings(*more))
        assert done.returncode == 0, done.stderr
        curves[2, micro] = losses(tmp_path / f"two-{micro}")
    reference = curves[1, 4]
    assert len(reference) == 6 and reference[0] - reference[-1] > 0.1
    for case, curve in curves.items():
        assert max(abs(a - b) for a, b in zip(curve, reference, strict=True)) <= 1e-5, case
    rows = [read_metrics(tmp_path / name)[-1] for name in ("one-4", "two-1")]
    assert rows[0]["val/loss"] == pytest.approx(rows[1]["val/loss"], abs=1e-5)
    assert rows[0]["val/first/bits_per_byte"] == pytest.approx(
        rows[1]["val/first/bits_per_byte"], abs=1e-5
    )


def test_checkpointed_activations_change_nothing(settings, tmp_path):
    curves = {}
    for name, override in (
        ("none", "parallel.activation_checkpointing=none"),
        ("selective", "parallel.activation_checkpointing=selective"),
        ("full", "parallel.activation_checkpointing=full"),
    ):
        assert train_here(
            settings(
                override,
                f"output_dir={tmp_path / name}",
                f"log_dir={tmp_path / name / 'l'}",
                steps=3,
            )
        )
        curves[name] = losses(tmp_path / name / "l")
        weights = load_file(tmp_path / name / "step_3" / "model.safetensors")
        assert "model.layers.1.mlp.up_proj.weight" in weights and len(weights) == 2 * 9 + 3
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["none"], abs=1e-5), name


@pytest.mark.parametrize("keep", ["none", "selective", "full"])
def test_compiled_blocks_change_nothing(settings, tmp_path, monkeypatch, keep):
    if keep == "full" and not shutil.which("g++"):
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    backend = "inductor" if keep == "full" else "aot_eager"  # which traces without a compiler
    stock = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda block, **overrides: stock(block, backend=backend, **overrides),
    )
    curves = []
    for compiled in ("false", "true"):
        where = [f"output_dir={tmp_path / compiled}", f"log_dir={tmp_path / compiled / 'l'}"]
        overrides = [f"parallel.compile={compiled}", f"parallel.activation_checkpointing={keep}"]
        saving = ["checkpoint.every=100", "validation.every=0"]
        assert train_here(settings(*overrides, *where, *saving, steps=3))
        curves.append(losses(tmp_path / compiled / "l"))
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_under_bf16_the_rotary_tables_and_the_gradients_stay_fp32(settings, monkeypatch):
    seen = set()
    forward = TransformerBlock.forward

    def watched(self, x, cos, sin, mask, *rest):
        seen.add((x.dtype, self.mlp.up_proj.weight.dtype, cos.dtype, sin.dtype))
        return forward(self, x, cos, sin, mask, *rest)

    def clip(parameters, limit):
        seen.update(parameter.grad.dtype for parameter in parameters)
        return torch.tensor(1.0)

    monkeypatch.setattr(TransformerBlock, "forward", watched)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    assert train_here(settings("parallel.dtype=bfloat16", steps=1))
    assert seen == {(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32), torch.float32}


def test_golden_loss(settings, tmp_path):
    """A refactor without a change of the maths reproduces these losses.

    They were measured on an AVX-512 CPU with torch 2.13.
    """
    train_here(["data.store=" + str(tmp_path / "dummy"), *golden_settings(tmp_path)])
    assert losses(tmp_path / "logs") == pytest.approx(GOLDEN, abs=2e-5)


def golden_settings(tmp_path: Path) -> list[str]:
    from data.store import write_dummy_store

    write_dummy_store(tmp_path / "dummy", 512, 20_000, seed=0)
    more = [
        "data.mix={dummy: 1}",
        "steps=6",
        "schedule={warmup_steps: 2, total_steps: 6, decay_steps: 2}",
    ]
    return [
        *more,
        "parallel.dtype=float32",
        f"output_dir={tmp_path / 'c'}",
        f"log_dir={tmp_path / 'logs'}",
    ]


GOLDEN = [6.248015, 6.026969, 5.660190, 5.345801, 5.065728, 4.933698]


def test_resumed_equals_uninterrupted_bit_for_bit_over_a_phase_border(settings, tmp_path):
    """A run that is stopped in each phase and at the border ends in the same state."""

    def phases(name: str, first: list[str], second: list[str]) -> Path:
        place = lambda phase: f"output_dir={tmp_path / name / phase}"  # noqa: E731
        log = f"log_dir={tmp_path / name / 'logs'}"
        longer = (
            "data.sequence_length=32",
            "data.mix={second: 1.0}",
            "rope_theta=500000",
            "allow_theta_jump=true",
        )
        longer += ("data.micro_batch_size=4",)
        for stop in first:
            train_here(settings(place("one"), log, f"steps={stop}", "checkpoint.every=2"))
        for stop in second:
            resume = f"resume_from={tmp_path / name / 'one'}"
            train_here(settings(place("two"), log, f"steps={stop}", resume, *longer, phase="two"))
        return tmp_path / name / "two" / "step_12"

    straight = phases("straight", ["6"], ["6"])
    stopped = phases("stopped", ["1", "4", "6"], ["2", "5", "6"])
    assert same_state(straight, stopped, tmp_path)
    assert losses(tmp_path / "straight" / "logs") == losses(tmp_path / "stopped" / "logs")
    rows = read_metrics(tmp_path / "stopped" / "logs")
    assert [row["step"] for row in rows] == list(range(1, 13)) and [
        row["batch_index"] for row in rows
    ] == [*range(1, 7)] * 2
    assert [row["phase"] for row in rows] == ["one"] * 6 + ["two"] * 6
    assert rows[-1]["lr"] == 0.0 and rows[-1]["tokens"] == 12 * 512
    assert load_hf(straight).config.rope_theta == 500_000


def test_a_phase_border_in_memory_equals_one_through_a_checkpoint(settings, tmp_path):
    """The second phase is equal with the model and optimizer from memory and from the disk."""
    from data.dataloader import PackedDataLoader
    from data.store import open_shards
    from models.layers import RotaryEmbedding
    from training import setup
    from training.checkpoint import Checkpointer
    from training.config import load
    from training.logger import Log
    from training.loop import train
    from training.objectives import next_token

    border = ("rope_theta=500000", "allow_theta_jump=true", "data.mix={second: 1.0}")
    config = ROOT / "configs" / "test_mode.yaml"
    live = [
        load(
            config,
            settings(
                f"output_dir={tmp_path / 'live' / phase}",
                f"log_dir={tmp_path / 'live'}",
                *more,
                phase=phase,
            ),
        )
        for phase, more in (("one", ()), ("two", border))
    ]
    with setup.ranks() as device:
        state = setup.build(live[0], device)
        for run in live:
            shards = open_shards(run.data.store, run.data.mix, "train", run.model.vocab_size)
            shape = (run.data.sequence_length, run.data.rows, run.data.micro_batch_size)
            loader = PackedDataLoader(shards, run.data.mix, *shape, run.seed)
            if run.phase == "two":
                state.phase, state.phase_start, state.phase_end, state.batch_index = (
                    "two",
                    state.step,
                    state.step + run.steps,
                    0,
                )
                state.faults = state.faults.next_phase()
                head_dim = run.model.resolved_head_dim
                state.model.rotary = RotaryEmbedding(
                    head_dim, run.model.max_position_embeddings, run.model.rope_theta
                )
            checkpointer = Checkpointer(run.checkpoints, run.checkpoint, torch.float32, None, {})
            assert not train(
                run,
                state,
                loader,
                next_token(run.optim.z_weight),
                checkpointer,
                Log(run.logs, run.log, True, {}),
            )
    resume = f"resume_from={tmp_path / 'checkpoints' / 'one'}"
    assert train_here(settings()) and train_here(settings(resume, *border, phase="two"))
    assert same_state(
        tmp_path / "live" / "two" / "step_12",
        tmp_path / "checkpoints" / "two" / "step_12",
        tmp_path,
    )


def wait_for(path: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def wait_for_a_step(logs: Path) -> None:
    """Wait until a run has finished a step: then all its ranks are in the loop."""
    wait_for(logs / "metrics.jsonl")
    end = time.monotonic() + 60
    while not (logs / "metrics.jsonl").stat().st_size:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_checkpoint_is_a_hugging_face_folder(settings, tmp_path):
    assert train_here(settings("parallel.dtype=bfloat16"))
    folder = tmp_path / "checkpoints" / "one" / "step_6"
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = torch.tensor([tokenizer.encode("def f(x):", add_special_tokens=False)])
    assert ids[0].tolist() == load_tokenizer(folder).encode("def f(x):").ids
    ours = load_hf(folder, dtype=None)
    assert (model(ids).logits.float() - ours(ids).float()).abs().max() <= 2e-2
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    state = whole_state(folder, tmp_path / "state.pt")
    assert {
        value.dtype for name, value in state.items() if name.startswith(("model", "exp_avg"))
    } == {torch.float32}
    assert torch.equal(state["model norm.weight"].bfloat16(), weights["model.norm.weight"])


def test_damaged_checkpoints_are_set_aside_and_old_ones_pruned(settings, tmp_path, capfd):
    assert train_here(settings("checkpoint={every: 1, keep: 3}"))
    folder = tmp_path / "checkpoints" / "one"
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_4", "step_5", "step_6"]
    content = bytearray((folder / "step_6" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "step_6" / "model.safetensors").write_bytes(content)
    (folder / "step_5" / "state" / ".metadata").unlink()
    assert train_here(settings("checkpoint={every: 1, keep: 3}"))
    output = capfd.readouterr().out
    assert (
        "step_6 is damaged (model.safetensors has changed)" in output
        and "resumes at step 4" in output
    )
    assert {"step_5.damaged", "step_6.damaged", "step_6"} <= {
        path.name for path in folder.iterdir()
    }

"""verify_checkpoint, loading and resuming with damaged and forged step folders."""

import json
import sys
import tempfile
from contextlib import ExitStack
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from conftest import tiny_config
from hypothesis import strategies as st

from fuzz.bases import Files, files_of, write_files
from fuzz.mutate import Change, change_folder, folder_changes
from fuzz.sandbox import fuzz
from models.hf import load_hf
from scripts import verify_checkpoint
from training import setup
from training.checkpoint import CheckpointConfig, Checkpointer, load_state
from training.config import DataConfig, RunConfig
from training.state import State

STEP = 3
RUN = RunConfig(
    phase="one",
    steps=10,
    model=tiny_config(
        **{"hidden_size": 8, "intermediate_size": 8, "vocab_size": 24, "num_hidden_layers": 1},
        **{"max_position_embeddings": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    data=DataConfig(sequence_length=16, tokens_per_step=16, micro_batch_size=1),
)
OPEN = ExitStack()  # keeps the process group open until the sandbox ends


@cache
def device() -> torch.device:
    return OPEN.enter_context(setup.ranks())


def checkpoints(folder: Path) -> Checkpointer:
    return Checkpointer(
        folder, CheckpointConfig(), torch.float32, None, {"bos": 0, "eos": 0, "pad": 1}
    )


@cache
def step_files() -> Files:
    """Files of a tiny run's step folder, with optimizer moments."""
    with tempfile.TemporaryDirectory() as folder, setup.ranks() as here:
        state = setup.build(RUN, here)
        state.model(torch.arange(16)[None]).square().mean().backward()
        state.optimizer.step()
        state.step, state.tokens = STEP, 48
        checkpoints(Path(folder)).save(state, metric=1.5)
        return files_of(Path(folder) / f"step_{STEP}")


def seal(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files with recomputed checksums, as a forger would write them."""
    try:
        manifest = json.loads(files["manifest.json"])
        manifest["files"] = {name: sha256(files[name]).hexdigest() for name in manifest["files"]}
        return {**files, "manifest.json": json.dumps(manifest).encode()}
    except (KeyError, TypeError, AttributeError, ValueError):
        return files


def tensors_of(state: State) -> list[torch.Tensor]:
    moments = [
        value for kinds in state.optimizer.state.values() for _, value in sorted(kinds.items())
    ]
    return [
        value.full_tensor() if hasattr(value, "full_tensor") else value
        for value in [*state.model.parameters(), *moments]
    ]


@cache
def written() -> list[torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        state = setup.build(RUN, device())
        load_state(write_files(step_files(), Path(folder) / f"step_{STEP}"), state)
        return [value.clone() for value in tensors_of(state)]


def verify(folder: Path) -> int:
    """Return the exit status of verify_checkpoint."""
    sys.argv = ["verify_checkpoint", str(folder), "--model"]
    try:
        verify_checkpoint.main()
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError


EXAMPLES = [
    (
        [
            ("json", "manifest.json", [("drop", ("files", name))]),
            ("bytes", name, [("flip", at, 6)]),
        ],
        False,
        False,
    )
    for name, at in (("model.safetensors", 1926), ("state/__0_0.distcp", 31358))
]
EXAMPLES += [
    ([("json", "state/trainer.json", [change])], True, True)
    for change in (
        ("wrap", ("rate",), "dict"),
        ("put", ("faults", "losses"), 7),
        ("put", ("faults", "lr_scale"), "a"),
    )
]


@fuzz(
    st.deferred(lambda: st.tuples(folder_changes(step_files()), st.booleans(), st.booleans())),
    share=0.1,
    accepted=(0.08, 0.6),
    examples=EXAMPLES,
)
def test_checkpoints(case: tuple[list[Change], bool, bool], folder: Path) -> None:
    """An accepted folder without new checksums has the saved weights, moments and position."""
    changes, sealed, resume = case
    files = change_folder(step_files(), changes)
    step = write_files(seal(files) if sealed else files, folder / f"step_{STEP}")
    state = setup.build(RUN, device())
    if resume:  # a damaged folder of the run itself is set aside
        setup.restore_or_init(RUN, state, checkpoints(folder), "")
        state.faults.check_step(1.0, 1.0, RUN.faults)
        if state.step == 0:
            raise ValueError("the phase begins anew")
    else:
        status = verify(step)
        model = load_hf(step)
        load_state(step, state)
        assert sealed or status == 0
        assert sealed or all(map(torch.equal, model.parameters(), written()))
    if not sealed:
        assert state.step == STEP
        assert all(
            torch.equal(one, other) for one, other in zip(tensors_of(state), written(), strict=True)
        )

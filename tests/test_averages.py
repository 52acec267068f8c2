"""Averages of checkpoints: equal to numpy and transformers; measured at milestones of a plan."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import complaint_of, save_tiny, tiny_config
from safetensors.torch import load_file, save_file
from test_pipeline import edit_plan, events, losses, plan, run  # noqa: F401 - fixtures

from evals.engines import load_model
from evals.report import page, trained
from evals.report.build import stages
from files import read_json, write_json
from models.hf import load_hf, resolve_checkpoint
from scripts import average_checkpoints, export_gguf
from training import setup
from training.averaging import last_checkpoints, record_of, write_average
from training.checkpoint_files import find_damage, has_state, hash_files, model_hash
from training.ops import supervisor
from training.planning.cost import forecast
from training.planning.plan import load_plan, scheduled_phases

CONFIG = tiny_config(hidden_size=32, intermediate_size=48, max_position_embeddings=64)
pytestmark = pytest.mark.one_layer


def finish(folder: Path) -> Path:
    """Write the manifest of a step folder; return the folder."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    sums = hash_files(folder, names, "sha256")
    write_json(folder / "manifest.json", {"hash": "sha256", "metric": None, "files": sums})
    return folder


def convert(folder: Path, dtype: torch.dtype) -> Path:
    """Store the weights of a step folder in another dtype."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors")
    return finish(folder)


@pytest.fixture(scope="module")
def original(tmp_path_factory, text_store) -> Path:
    """A phase with checkpoints of steps 2, 4, 5, 6 and 7, which is still being written."""
    phase = tmp_path_factory.mktemp("phases") / "stable"
    for step in (2, 4, 5, 6):
        finish(save_tiny(phase / f"step_{step}", CONFIG, text_store, seed=step))
    (phase / "step_7.tmp").mkdir()
    return phase


@pytest.fixture
def phase(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "stable"))


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def test_an_average_equals_numpy_and_loads_in_transformers(phase, capsys, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("sys.argv", ["x", "--phase_folder", str(phase), "--last", "3"])
    average_checkpoints.main()
    output = phase / "average_6"
    sources = [phase / f"step_{step}" for step in (4, 5, 6)]
    means = {
        name: np.mean([weights_of(s)[name] for s in sources], axis=0)
        for name in weights_of(sources[0])
    }
    written = weights_of(output)
    assert written.keys() == means.keys()
    for name, mean in means.items():
        assert np.array_equal(written[name], mean.astype(np.float32)), name
    assert read_json(output / "average.json")["sources"] == [
        {"checkpoint": str(s), "step": step, "hash": model_hash(s), "weight": 1.0}
        for s, step in zip(sources, (4, 5, 6), strict=True)
    ]
    names = {path.name for path in output.iterdir()}
    kept = {path.name for path in sources[0].iterdir() if "tiktoken" not in path.name}
    assert names == kept | {"average.json"}
    tokens = torch.arange(20).view(2, 10)
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(output).vocab_size == CONFIG.vocab_size
    with torch.no_grad():
        difference = load_hf(output)(tokens) - theirs(tokens).logits
    assert difference.abs().max() < 1e-4
    # What reads a step folder reads the average, and training cannot resume from it.
    assert resolve_checkpoint(str(output)) == setup.find_checkpoint(output, True) == output
    assert find_damage(output) is None and not has_state(output)
    assert load_model(output).name == str(output)
    gguf = phase.parent / "average.gguf"
    flags = ["x", "--checkpoint", str(output), "--outtype", "f16", "--outfile", str(gguf)]
    monkeypatch.setattr("sys.argv", flags)
    export_gguf.main()
    assert gguf.stat().st_size > 0
    # Pruning of step folders leaves it, and so does the same command.
    before = (output / "manifest.json").stat().st_mtime_ns
    monkeypatch.setattr("sys.argv", ["x", "--phase_folder", str(phase), "--last", "3"])
    average_checkpoints.main()
    assert "is the average of" in capsys.readouterr().out
    assert (output / "manifest.json").stat().st_mtime_ns == before


def test_bfloat16_and_shards_are_averaged_in_double_precision(phase, tmp_path):
    """Weights 1 and 3; the second source has two shards, as large models have."""
    first, second = (convert(phase / f"step_{step}", torch.bfloat16) for step in (4, 5))
    tensors = load_file(second / "model.safetensors")
    (second / "model.safetensors").unlink()
    halves = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for name, part in halves.items():
        save_file({key: tensors[key] for key in part}, second / name)
    places = {key: name for name, part in halves.items() for key in part}
    write_json(second / "model.safetensors.index.json", {"weight_map": places})
    finish(second)
    write_average(record_of([first, second], [1, 3]), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    one, two = weights_of(first), weights_of(second)
    for name, tensor in written.items():
        mean = np.average([one[name], two[name]], axis=0, weights=[1, 3])
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, torch.from_numpy(mean).to(torch.bfloat16)), name


def test_the_last_checkpoints_are_those_of_complete_steps(phase):
    steps = lambda *limits: [f.name for f in last_checkpoints(phase, *limits)]  # noqa: E731
    assert steps(2) == ["step_5", "step_6"]
    assert steps(2, 2) == ["step_4", "step_6"]
    assert steps(2, 1, 4) == ["step_2", "step_4"]
    (phase / "step_5" / "manifest.json").unlink()
    assert steps(3) == ["step_2", "step_4", "step_6"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--phase_folder P --last 9",
            "has 4 complete checkpoints (step_2, step_4, step_5, step_6)",
        ),
        (
            "--phase_folder P --every 4 --last 2",
            "checkpoints of every 4 steps (step_4), but 2 were",
        ),
        ("--phase_folder P/none", "none does not exist"),
        ("--checkpoints P/step_4 P/step_7.tmp --output_dir O", "step_7.tmp is being written"),
        ("--checkpoints P/step_4 P/step_4 --output_dir O", "is given twice"),
        ("--checkpoints P/step_4 --output_dir O", "needs at least two"),
        ("--checkpoints P/step_4 P --output_dir O", "is not a checkpoint"),
        ("--checkpoints P/step_4 P/step_5", "--checkpoints needs an --output_dir"),
        (
            "--checkpoints P/step_4 P/step_5 --last 2 --output_dir O",
            "choose among a --phase_folder",
        ),
        ("--phase_folder P --last 2 --weights 1 2 3", "3 weights for 2 checkpoints"),
        ("--phase_folder P --last 2 --weights 1 0", "0 must be above 0"),
        (
            "--phase_folder P --last 2 --output_dir P/step_2",
            "step_2 exists and is not an average; give another",
        ),
        ("--checkpoints P/step_4 P/wide --output_dir O", "intermediate_size is 48 in"),
        ("--checkpoints P/step_4 P/theta --output_dir O", "rope_theta is 10000.0 in"),
        ("--checkpoints P/step_4 P/half --output_dir O", "and BF16"),
        ("--checkpoints P/step_4 P/shape --output_dir O", "average checkpoints of one shape"),
        ("--checkpoints P/step_4 P/fewer --output_dir O", "only one of"),
        ("--checkpoints P/step_4 P/words --output_dir O", "have different tokenizers"),
        ("--checkpoints P/step_4 P/damaged --output_dir O", "model.safetensors has changed"),
        ("--checkpoints P/step_4 P/nan --output_dir O", "is not finite"),
    ],
)
def test_mistakes_end_in_one_sentence(
    phase, text_store, tmp_path, capsys, monkeypatch, flags, message
):
    other = phase / flags.partition(" P/step_4 P/")[2].partition(" ")[0]
    weights = load_file(phase / "step_5" / "model.safetensors")
    if other.name in ("wide", "theta"):
        changes = {"wide": {"intermediate_size": 64}, "theta": {"rope_theta": 20_000.0}}
        config = tiny_config(**{**CONFIG.__dict__, **changes[other.name]})
        finish(save_tiny(other, config, text_store))
    elif other.name in ("half", "shape", "fewer", "words", "damaged", "nan"):
        shutil.copytree(phase / "step_5", other)
        weights["lm_head.weight"][0, 0] = float("nan")
        if other.name == "shape":
            weights["lm_head.weight"] = weights["lm_head.weight"][1:].contiguous()
        elif other.name == "fewer":
            del weights["lm_head.weight"]
        if other.name in ("shape", "fewer", "damaged", "nan"):
            save_file(weights, other / "model.safetensors")
        if other.name == "words":
            content = read_json(other / "tokenizer.json")
            write_json(other / "tokenizer.json", content)  # other bytes
        if other.name != "damaged":
            convert(other, torch.bfloat16 if other.name == "half" else torch.float32)
    words = [w.replace("P", str(phase), w.startswith("P")) for w in flags.split()]
    words = [str(tmp_path / "out") if word == "O" else word for word in words]
    before = sorted(tmp_path.rglob("*"))
    assert message in complaint_of(average_checkpoints.main, words, capsys, monkeypatch)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind


MEASURE = """
import json, sys
from pathlib import Path
folder, output = map(Path, sys.argv[1:])
assert (folder / "model.safetensors").is_file()
output.parent.mkdir(parents=True, exist_ok=True)
value = 11.0 if folder.name.startswith("average") else 15.0
output.write_text(json.dumps({"metrics": {"all": {"perplexity": value}}}))
print("measured", folder.name)
"""


@pytest.fixture
def averaging(plan, run, monkeypatch) -> Path:  # noqa: F811
    """The plan of test_pipeline with an average of two checkpoints at step 4, made in this process.

    The raw checkpoints have perplexity 15, a caution, and the average 11.
    """
    (plan / "measure.py").write_text(MEASURE)
    content = yaml.safe_load((plan / "plan.yaml").read_text())
    content["phases"][0]["milestones"][1]["averages"] = 2
    edit_plan(plan, phases=content["phases"])
    start = supervisor.subprocess.Popen

    def in_this_process(command: list[str], env: dict[str, str]) -> object:
        if "scripts.average_checkpoints" not in command:
            return start(command, env)
        monkeypatch.setattr("sys.argv", command[2:])
        average_checkpoints.main()
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(supervisor, "subprocess", SimpleNamespace(Popen=in_this_process))
    return plan


def test_a_plan_measures_an_average_beside_the_raw_checkpoint(averaging, run):  # noqa: F811
    output = run().stdout
    folder = averaging / "checkpoints" / "tiny" / "one"
    one, two = (weights_of(folder / f"step_{step}") for step in (3, 4))
    mean = weights_of(folder / "average_4")
    assert all(np.array_equal(mean[n], ((one[n] + two[n]) / 2).astype(np.float32)) for n in mean)
    [event] = events(averaging, "forecast")
    assert (event["step"], event["averages"], event["values"], event["outcome"]) == (
        4,
        2,
        [11.0],
        "go",
    )
    assert "forecast at step 4, average of 2 checkpoints: go; all.perplexity = 11.000" in output
    assert "decision at step 4: CAUTION" in output  # of the raw checkpoint
    # Training went on from the raw checkpoint, and nothing is done twice.
    parent = read_json(averaging / "checkpoints/tiny/two/step_8/state/trainer.json")["parent"]
    assert parent == model_hash(folder / "step_4")
    again = run().stdout
    assert "measured" not in again and "average_checkpoints" not in again
    shutil.rmtree(folder / "average_4")  # may be deleted once it was measured
    assert "average" not in run().stdout
    # Both are in the report.
    table = stages(averaging / "results" / "tiny")
    values = {name: metrics for name, metrics in table.items() if "4" in name}
    assert values.keys() == {"step_4", "step_4_average"}
    history = trained.training(averaging / "logs" / "tiny", folder / "step_4")
    assert [f["values"] for f in history["forecasts"]] == [[11.0]]
    assert [g["values"] for g in history["gates"] if g["step"] == 4] == [[15.0]]
    assert "Average of 2 checkpoints: a forecast" in page._gates({"training": history})
    # A changed number is measured again, and skipped if a checkpoint was deleted.
    shutil.rmtree(folder / "step_3")
    phases = yaml.safe_load((averaging / "plan.yaml").read_text())["phases"]
    phases[0]["milestones"][1]["averages"] = 3
    edit_plan(averaging, phases=phases)
    output = run().stdout
    assert "no forecast at step 4, average of 3 checkpoints" in output
    assert "measured" not in output and not (folder / "average_4").exists()


def test_a_plan_makes_its_average_again_if_a_folder_has_another(averaging, run):  # noqa: F811
    """A user's own average_4, one of weights that were trained again, a copy, a damaged folder."""
    run()
    phase_folder = averaging / "checkpoints" / "tiny" / "one"
    average = phase_folder / "average_4"
    decision = averaging / "results" / "tiny" / "step_4_average" / "decision.json"
    weights, sources = weights_of(average), [phase_folder / f"step_{step}" for step in (3, 4)]

    def weigh() -> str:
        shutil.rmtree(average)
        write_average(record_of(sources, [2, 1]), average)
        return f"is the average of {sources[0]} (weight 2), {sources[1]} (weight 1), not of check"

    def train_again() -> str:
        record = read_json(average / "average.json")
        record["sources"][-1]["hash"] = "of step 4 before it was trained again"
        write_json(average / "average.json", record)
        return "is an average of step_4 before its weights changed"

    def choose_others() -> str:
        shutil.rmtree(average)
        write_average(record_of([phase_folder / "step_2", sources[1]]), average)
        return f"is the average of {phase_folder / 'step_2'}, {sources[1]}, not of checkpoints"

    def copy() -> str:
        (average / "average.json").unlink()
        return "is not an average"

    def damage() -> str:
        (average / "config.json").write_text("{}")
        return "is damaged (config.json has changed)"

    for number, change in enumerate((weigh, train_again, choose_others, copy, damage), 1):
        why = change()
        write_json(decision, {**read_json(decision), "raw": "of another step 4"})
        output = run().stdout
        assert f"checkpoints/tiny/one/average_4 {why}" in output
        assert average.with_name(f"average_4.old{number}").is_dir()
        written = weights_of(average)
        assert all(np.array_equal(written[name], weights[name]) for name in weights)
        assert read_json(decision)["raw"] == model_hash(average.with_name("step_4"))
        assert find_damage(average) is None
    assert "average_4" not in run().stdout


def test_a_plan_takes_its_average_without_the_deleted_sources(averaging, run):  # noqa: F811
    run()
    folder = averaging / "checkpoints" / "tiny" / "one"
    shutil.rmtree(folder / "step_3")
    shutil.rmtree(averaging / "results" / "tiny" / "step_4_average")
    output = run().stdout
    assert "measured average_4" in output and "average_checkpoints" not in output
    # The record of another average needs the deleted source.
    record = read_json(folder / "average_4" / "average.json")
    record["sources"][0]["weight"] = 2.0
    write_json(folder / "average_4" / "average.json", record)
    (folder / "step_2" / "manifest.json").unlink()  # a third checkpoint is not complete
    shutil.rmtree(averaging / "results" / "tiny" / "step_4_average")
    output = run().stdout
    assert "measured average_4" not in output
    assert "warning: no forecast at step 4, average of 2 checkpoints" in output
    assert (folder / "average_4").is_dir()  # not touched


def test_a_failed_average_ends_neither_training_nor_the_plan(averaging, run, monkeypatch):  # noqa: F811
    failing = SimpleNamespace(status=7)
    start = supervisor.subprocess.Popen

    def fail(command: list[str], env: dict[str, str]) -> object:
        if "scripts.average_checkpoints" in command and failing.status:
            return SimpleNamespace(wait=lambda: failing.status)
        return start(command, env)

    monkeypatch.setattr(supervisor, "subprocess", SimpleNamespace(Popen=fail))
    done = run()
    sentence = "no forecast at step 4, average of 2 checkpoints (exit status 7)"
    assert f"{sentence}; the plan continues without it" in done.stdout
    assert done.stdout.rstrip().splitlines()[-3] == f"warning: {sentence}"
    assert [event["step"] for event in events(averaging, "no_average")] == [4]
    assert (averaging / "checkpoints/tiny/tuned/step_1").is_dir() and "last check" in done.stdout
    # A stage that needs it stops the plan, whether its command or its config names it.
    content = yaml.safe_load((averaging / "plan.yaml").read_text())
    stages, average = content["stages"], "checkpoints/tiny/one/average_4"
    (averaging / "base.yaml").write_text(f"init_from: {average}\n")
    for words in (f"--base_model {average}", f"init_from={average}", "--config base.yaml"):
        stage = {"name": "more", "output_dir": "checkpoints/tiny/more"}
        stage["commands"] = {"More": f"python none.py {words}"}
        edit_plan(averaging, stages=[*stages, stage])
        error = run(status=2).stderr
        assert f"stage more needs {average}, which is missing: {sentence}; remove" in error
    stage["commands"] = {"More": f"mkdir -p checkpoints/tiny/more/step_1/{average}0"}
    stage["commands"] |= {"Copy": "cp -r {checkpoint}/. checkpoints/tiny/more/step_1"}
    edit_plan(averaging, stages=[*stages, stage])
    run()  # average_40 is another folder
    # A signal still stops the plan, and a working command is tried again.
    failing.status = 143
    run(status=143)
    failing.status = 0
    assert "warning: no" not in run().stdout and (averaging / average).is_dir()


def test_an_average_changes_no_loss_and_may_be_a_stage(averaging, run):  # noqa: F811
    run()
    with_average = losses(averaging)
    content = yaml.safe_load((averaging / "plan.yaml").read_text())
    del content["phases"][0]["milestones"][1]["averages"]
    command = "python -m scripts.average_checkpoints --phase_folder checkpoints/tiny/two --last 2"
    stage = {"name": "averaged", "output_dir": "checkpoints/tiny/averaged", "evals": ["perplexity"]}
    stage["commands"] = {"Average": f"{command} --output_dir checkpoints/tiny/averaged/step_8"}
    edit_plan(averaging, phases=content["phases"], stages=[stage])
    for name in ("checkpoints", "logs", "results"):
        (averaging / name).rename(averaging / f"{name}_before")
    output = run().stdout
    assert losses(averaging) == with_average
    assert output.count("measured step_8") == 2
    assert "\nlast checkpoints/tiny/averaged/step_8" in output
    again = run().stdout
    assert "measured" not in again and "step_8 is the average of" in again
    # Retention may delete a source.
    shutil.rmtree(averaging / "checkpoints" / "tiny" / "two" / "step_6")
    again = run().stdout
    assert "measured" not in again and "step_8 is the average of" in again


def test_a_finished_average_needs_none_of_its_deleted_sources(phase, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    steps = [str(phase / f"step_{step}") for step in (4, 5)]
    given = ["--checkpoints", *steps, "--weights", "2", "1", "--output_dir", str(output)]
    last = ["--phase_folder", str(phase), "--last", "3"]
    for flags in (given, last):
        monkeypatch.setattr("sys.argv", ["x", *flags])
        average_checkpoints.main()
    shutil.rmtree(phase / "step_4")
    capsys.readouterr()
    for flags in (given, last, [*last, "--until", "6"]):
        monkeypatch.setattr("sys.argv", ["x", *flags])
        average_checkpoints.main()
    assert capsys.readouterr().out.count("is the average of") == 3
    wrong = [
        ([*given[:-4], "1", "2", *given[-2:]], "(weight 1), "),
        ([*last, "--every", "2"], "has 2 complete checkpoints of every 2 steps"),
        (["--phase_folder", str(phase), "--last", "2"], "average_6 exists and is the average of"),
        (["--phase_folder", str(phase), "--last", "4"], "has 3 complete checkpoints"),
    ]
    for flags, message in wrong:
        assert message in complaint_of(average_checkpoints.main, flags, capsys, monkeypatch)
    shutil.copytree(phase / "step_5", phase / "step_8")
    flags = [*last, "--output_dir", str(phase / "average_6")]  # trained on since
    message = complaint_of(average_checkpoints.main, flags, capsys, monkeypatch)
    assert "average_6 exists and is the average of" in message and "step_8" in message


def test_a_phase_must_keep_what_a_stage_averages(averaging, monkeypatch):
    monkeypatch.chdir(averaging)
    config = yaml.safe_load(Path("two.yaml").read_text())

    def planned(flags: str, **changes: object) -> None:
        changed = {**config, "checkpoint": {**config["checkpoint"], "every": 1, **changes}}
        Path("two.yaml").write_text(yaml.safe_dump(changed))
        command = (
            f"python -m scripts.average_checkpoints --phase_folder checkpoints/tiny/two {flags}"
        )
        stage = {"name": "mean", "output_dir": "checkpoints/tiny/mean", "commands": {"A": command}}
        edit_plan(Path(), stages=[stage])
        scheduled_phases(load_plan("plan.yaml"))

    planned("--last 3")  # keep is 3, and every step is saved
    planned("--last=4", keep=4)
    planned("--last 2 --until 6", keep=1, milestones=[5, 6])
    with pytest.raises(ValueError, match=r"last 4 checkpoints of two, but checkpoint.keep=3"):
        planned("--last 4")
    with pytest.raises(ValueError, match="leaves 3 of them at its end; set it to 4"):
        planned("--last=4")
    planned("--last 2 --every 2", keep=1)  # step 6, where the decay begins, is kept
    with pytest.raises(ValueError, match="leaves 2 of them at its end; set it to 3"):
        planned("--last 3", keep=1)
    with pytest.raises(ValueError, match="last 5 checkpoints of two, which saves 4 of them; lower"):
        planned("", keep=9)
    (Path("checkpoints/tiny/mean") / "step_8").mkdir(parents=True)
    planned("--last 4")  # the average exists already


def test_a_phase_must_keep_what_a_milestone_averages(averaging, monkeypatch):
    monkeypatch.chdir(averaging)
    content = yaml.safe_load(Path("plan.yaml").read_text())
    milestone = content["phases"][0]["milestones"][1]

    def planned(averages: int, **changes: object) -> list:
        config = yaml.safe_load(Path("one.yaml").read_text())
        for key, value in changes.items():
            section, _, name = key.partition("__")
            target = config[section] if name else config
            target[name or section] = value
        Path("changed.yaml").write_text(yaml.safe_dump(config))
        milestone["averages"] = averages
        first = {**content["phases"][0], "config": "changed.yaml"}
        edit_plan(Path(), phases=[first, content["phases"][1]])
        return forecast(load_plan("plan.yaml"), "h100", 1)["evaluations"]

    assert planned(3) == []  # steps 2, 3 and 4 are saved
    with pytest.raises(
        ValueError, match=r"last 5 checkpoints of one, but checkpoint.keep is 3; set"
    ):
        planned(5)
    with pytest.raises(ValueError, match="of one, which saves 3 by then; lower averages or"):
        planned(4, checkpoint__keep=4)
    with pytest.raises(ValueError, match="in which rope theta changes"):
        planned(2, rope_theta=[10_000, 20_000], allow_theta_jump=True)
    with pytest.raises(ValueError, match=r"averages=1 must be at least 2"):
        planned(1)
    disk = [
        forecast(load_plan("plan.yaml"), "h100", 1)["disk"]["checkpoints"] for _ in [planned(2)]
    ]
    del milestone["averages"]
    edit_plan(Path(), phases=content["phases"])
    assert disk[0] > forecast(load_plan("plan.yaml"), "h100", 1)["disk"]["checkpoints"]

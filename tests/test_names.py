"""Names typed by users: data sets, misplaced config keys, flags; commands in any folder."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, complaint_of, one_thread

import train
import train_dpo
import train_sft
from data.corpus.sources import GROUPS, HUB_SOURCES, sources_of, validation_sources
from data.store import open_shards
from models.nanollama import FIELD_ALIASES, ModelConfig
from scripts import check_env, download_data, prepare_data
from training.aliases import DATA_MIXES, NEW_NAMES, NOTES, RENAMED, _settings
from training.config import RunConfig, load
from training.planning.plan import Milestone, Plan
from training.settings import load_settings, read_yaml

KINDS = (train_sft.SFTConfig, train_dpo.PreferenceRun)


# data sets


def test_names_of_data_sets():
    assert sources_of("fineweb-edu") == ("fineweb_edu",)
    assert sources_of("pg19_and_stack_mixed") == ("pg19", "the_stack_python")
    assert sources_of("gold-sources-mixed") == ("open_web_math", "stackexchange", "stem_wiki")
    assert sources_of("my-texts") == ("my-texts",)
    assert validation_sources("fineweb-edu-validation") == ("fineweb_edu",)
    assert validation_sources("fineweb_edu") == validation_sources("my-validation") == ()
    assert {name for group in GROUPS.values() for name in group} <= set(HUB_SOURCES)


def test_download_takes_them(tmp_path, monkeypatch, capsys):
    asked = []

    def reader(dataset, *_):
        asked.append(dataset)
        raise ValueError("enough")

    monkeypatch.setattr(download_data, "open_reader", reader)

    def complaint(*names: str) -> str:
        arguments = ["--output", tmp_path, "--dataset", *names]
        return complaint_of(download_data.main, arguments, capsys, monkeypatch)

    for names, first in (
        (["fineweb-edu"], "fineweb_edu"),
        (["gold_sources_mixed"], "open_web_math"),
        ([f"{tmp_path}/no-such-file.txt"], f"{tmp_path}/no-such-file.txt"),
    ):
        complaint(*names)
        assert asked.pop() == first
    message = complaint("fineweb-edu-validation")
    assert (
        "is the validation split of fineweb_edu, which prepare_data creates; download fineweb"
        in message
    )
    (tmp_path / "documents" / "fineweb_edu").mkdir(parents=True)
    line = ["x", "--output", str(tmp_path), "--dataset", "fineweb-edu-validation"]
    monkeypatch.setattr(sys, "argv", line)
    download_data.main()  # downloads nothing
    assert not asked and "is the validation split of fineweb_edu" in capsys.readouterr().out


def test_a_mixture_of_other_names_is_answered(text_store):
    for name, means in (
        ("fineweb-edu", "fineweb_edu"),
        ("pg19_and_stack_mixed", "pg19, the_stack"),
    ):
        with pytest.raises(ValueError, match=f"available: first, second; use {means}.* for {name}"):
            open_shards(text_store, {name: 1.0}, "train", 384)
    with pytest.raises(ValueError, match=r"available: first, second$"):
        open_shards(text_store, {"third": 1.0}, "train", 384)


def test_the_mixtures_that_dataset_is_answered_with_are_those_of_the_configs():
    for name, mix in DATA_MIXES.items():
        assert set(yaml.safe_load(mix)) == set(sources_of(name))
    configs = ("phase1_pretrain", "phase2_annealing", "phase3_crystallization")
    mixes = [load(ROOT / "configs" / f"{config}.yaml").data.mix for config in configs]
    assert [yaml.safe_load(mix) for mix in DATA_MIXES.values()] == mixes


# keys of configs


def test_every_key_that_is_answered_with_exists():
    known = {setting for kind in (*KINDS, Milestone) for setting in _settings(kind)}
    assert set(RENAMED) <= known
    assert set(NOTES) <= known | set(NEW_NAMES)
    assert set(FIELD_ALIASES) <= set(ModelConfig.__dataclass_fields__)
    others = [name for names in RENAMED.values() for name in names.split()]
    assert len(others) == len(set(others))  # one answer for each


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("batch_size_per_gpu", "data.micro_batch_size here (rows)"),
        ("global_batch_size", "data.tokens_per_step here (in tokens: rows x data.sequence_length)"),
        ("learning_rate", "optim.lr here"),
        ("optim.learning_rate", "optim.lr here"),
        ("max_steps", "steps here (updates in this phase)"),
        ("training.num_steps", "steps here (updates in this phase)"),
        ("seq_len", "data.sequence_length here (tokens in a row)"),
        (
            "sequence_length",
            "data.sequence_length here (tokens in a row)",
        ),  # our keys in the wrong section
        ("warmup_steps", "schedule.warmup_steps here"),
        ("optim.warmup_steps", "schedule.warmup_steps here"),
        ("rope_base", "rope_theta here"),
        ("weight_decay", "optim.weight_decay here"),
        ("z-loss-weight", "optim.z_weight here"),
        ("wandb_project", "log.wandb_project here"),
        ("save_every", "checkpoint.every here"),
        ("checkpoint.checkpoint_interval", "checkpoint.every here"),
        ("eval_every", "validation.every here"),
        ("n_layers", "model.num_hidden_layers here"),
        ("model.hidden_dim", "model.hidden_size here"),
        ("model.n_kv_heads", "model.num_key_value_heads here"),
        ("gradient_accumulation_steps", "data.tokens_per_step here (in tokens; micro-batches"),
        ("max_grad_norm", "optim.grad_clip here"),
    ],
)
def test_a_key_of_another_config_is_answered_with_the_new_name(key, answer):
    with pytest.raises(ValueError, match=re.escape(f"{key} is {answer}")):
        load(ROOT / "configs" / "base_1b.yaml", [f"{key}=1"])


def test_the_old_keys_of_a_plan_are_answered(tmp_path):
    (tmp_path / "plan.yaml").write_text(
        "name: x\nphases: [{config: c, milestones: [{at: 3}]}]\n"
        "stages: [{name: sft, leaves: sft, commands: {}}]\n",
        encoding="utf-8",
    )
    answer = "phases[0].milestones[0].at is step here; stages[0].leaves is output_dir here"
    with pytest.raises(ValueError, match=re.escape(answer)):
        load_settings(Plan, tmp_path / "plan.yaml")


def test_all_are_named_in_one_sentence(tmp_path, capsys, monkeypatch):
    (tmp_path / "old.yaml").write_text(
        "batch_size_per_gpu: 8\ndataset: pg19_and_stack_mixed\nmodel: {n_heads: 4}\n"
        "training: {learning_rate: 1e-3}\nstart_step: 0\n"
    )
    message = complaint_of(train.main, ["--config", tmp_path / "old.yaml"], capsys, monkeypatch)
    assert message == (
        "error: batch_size_per_gpu is data.micro_batch_size here (rows); "
        "dataset is data.mix here ({pg19: 0.5, the_stack_python: 0.5}); "
        "model.n_heads is model.num_attention_heads here; training.learning_rate is optim.lr here\n"
    )


def test_settings_of_another_kind_of_run_are_not_promised():
    with pytest.raises(ValueError, match="num_epochs is not a setting"):
        load(ROOT / "configs" / "base_1b.yaml", ["num_epochs=1"])
    with pytest.raises(ValueError, match=r"num_epochs is chat\.epochs here"):
        load_settings(train_sft.SFTConfig, ROOT / "configs" / "sft.yaml", ["num_epochs=1"])


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        (RunConfig, "plan_1b.yaml", "a plan; give it to scripts.pipeline"),
        (RunConfig, "sft.yaml", "a config of fine-tuning; give it to train_sft.py"),
        (RunConfig, "dpo.yaml", "a config of preference alignment; give it to train_dpo.py"),
        (RunConfig, "data/nanollama_1b.yaml", "a data recipe; give it to scripts.prepare_data"),
        (RunConfig, "evals/full.yaml", "a suite of evaluations; give it to scripts.run_evals"),
        (train_sft.SFTConfig, "dpo.yaml", "a config of preference alignment"),
        (Plan, "base_1b.yaml", "a config of pretraining; give it to train.py"),
        (Plan, "evals/milestone.yaml", "the config lacks name"),
    ],
)
def test_a_config_of_another_command_is_named(kind, path, message):
    with pytest.raises(ValueError, match=message):
        load_settings(kind, ROOT / "configs" / path)


# flags


@pytest.mark.parametrize("module", [train, train_sft, train_dpo])
def test_a_name_of_a_wandb_run_needs_a_project(module, tmp_path, capsys, monkeypatch):
    kind = {train: "configs/test_mode.yaml", train_sft: "configs/sft.yaml"}.get(module)
    config = ROOT / (kind or "configs/dpo.yaml")
    named = ["--config", config, "--wandb_run_name", "x"]
    message = complaint_of(module.main, named, capsys, monkeypatch)
    assert "log.wandb_run_name needs a W&B project; set --wandb_project" in message
    (tmp_path / "c.yaml").write_text(f"extends: {config}\nlog: {{wandb_project: p}}\nsteps: 0\n")
    message = complaint_of(
        module.main, ["--config", tmp_path / "c.yaml", *named[2:]], capsys, monkeypatch
    )
    # The log settings are valid: the project comes from the config.
    assert "steps=0 must be at least 1" in message


# folders


def test_commands_find_the_projects_configs_from_any_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "data" / "store").mkdir(parents=True)  # hides no package of ours
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "test_mode.yaml").write_text("phase: mine\n")
    monkeypatch.chdir(tmp_path)
    assert read_yaml(Path("configs/quickstart/base.yaml"))["run"] == "quickstart"
    # It extends base_1b.yaml.
    assert load("configs/phase1_pretrain.yaml").model.num_hidden_layers == 22
    # The working folder has priority.
    assert read_yaml(Path("configs/test_mode.yaml")) == {"phase": "mine"}
    with pytest.raises(
        ValueError, match=r"config file configs/sf.yaml not found; did you mean configs/sft"
    ):
        read_yaml(Path("configs/sf.yaml"))

    words = ["--config", "configs/data/quickstart.yaml"]
    message = complaint_of(prepare_data.main, words, capsys, monkeypatch)
    assert "/data/store/quickstart/tokenizer has no tokenizer.json" in message
    # Not forked: Python looks for packages in the working folder when it starts.
    command = ["-m", "scripts.launch", "train.py", "--config", "configs/quickstart/base.yaml"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, env=one_thread()
    )
    assert done.returncode == 2 and not (ROOT / "logs" / "mine").exists()
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: no data store found at data/store/quickstart"), last


# readiness of the machine


@pytest.mark.parametrize(
    ("free", "gpus"), [(34, 0), (900, 2), (900, 1), (1, 2), (499, 2), (500, 2), (649, 2)]
)
def test_check_env_tells_what_the_1b_plan_lacks(free, gpus, tmp_path, monkeypatch, capsys):
    usage = check_env.shutil._ntuple_diskusage(10**12, 0, free * 10**9)
    monkeypatch.setattr(check_env.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(check_env, "check_machine", lambda: ["small"] if free < 2 else [])
    monkeypatch.setattr(check_env.torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(check_env.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(check_env, "get_token", lambda: None if gpus == 1 else "token")
    monkeypatch.setenv("SLACK_WEBHOOK", "https://x")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["check_env", *arguments])
        with pytest.raises(SystemExit) as end:
            check_env.main()
        return end.value.code, capsys.readouterr().out

    status, output = run()
    assert status == (1 if free < 2 else 0)
    assert (
        "alert: slack           on\n" in output
        and "alert: email           off (set ALERT" in output
    )
    assert f"ready for: quickstart {'no: small' if free < 2 else 'yes'}\n" in output
    needs = [f"needs 2 GPUs ({gpus} found)"] if gpus < 2 else []
    why = "depending on how well its text compresses"
    warning = f"warning: {free} GB of disk are free here; the 1.1B plan needs 500 to 650 GB, {why}"
    assert (warning in output) == (500 <= free < 650)
    needs += [f"needs 500 to 650 GB of disk, {why} ({free} GB free here)"] * (free < 500)
    login = "https://huggingface.co/datasets/bigcode/the-stack-dedup, then run hf auth login)"
    needs += (
        [f"needs a login to the Hugging Face hub (accept the terms of {login}"] if gpus == 1 else []
    )
    needs = (["small"] if free < 2 else []) + needs
    assert f"1.1B plan {'no: ' + '; '.join(needs) if needs else 'yes'}\n" in output
    status, output = run("--plan", "configs/plan_1b.yaml")
    assert status == (1 if needs else 0) and all(f"to do: {need}\n" in output for need in needs)
    status, output = run("--plan", "configs/quickstart/plan.yaml")
    assert status == (1 if free < 2 else 0) and "1.1B" not in output


def test_check_env_names_missing_packages_of_evaluations(tmp_path, monkeypatch):
    plan = check_env.load_plan("configs/plan_1b.yaml")
    run = check_env.load(plan.phases[0].config)
    monkeypatch.setattr(check_env, "_version", {"nltk": "1", "langdetect": "1"}.get)
    absent = "needs xgrammar, alt-profanity-check for its evaluations"
    missing = check_env.missing_for(plan, run)
    assert f"{absent} (pip install -r requirements.txt)" in missing


# requirements

USERS = [
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "wandb",
    "datasketch",
    "lm_eval",
    "gguf",
]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pinned = [
        line.split(";")[0].strip().split("==") for line in lines if "==" in line and line[0] != "#"
    ]
    assert all(len(pin) == 2 for pin in pinned)
    return {package.lower().replace("_", "-"): version for package, version in pinned}


def test_requirements_name_the_users_packages_and_agree():
    files = {path.name: pins(path.name) for path in ROOT.glob("requirements*.txt")}
    text = (ROOT / "requirements.txt").read_text()
    assert {name.replace("_", "-") for name in USERS} <= set(files["requirements.txt"])
    assert (
        "-r requirements-core.txt" in text and "# flash-attn==2.8.3 is in requirements-gpu" in text
    )
    for name in {name for versions in files.values() for name in versions}:
        assert len({versions[name] for versions in files.values() if name in versions}) == 1, name


def test_requirements_have_every_package_that_is_imported():
    """A missing package is a missing score, and a no-go after days of training."""
    packages = ("models", "data", "inference", "export", "training", "evals", "lab", "scripts")
    trees = [
        ast.parse(path.read_text(encoding="utf-8"))
        for package in packages
        for path in (ROOT / package).rglob("*.py")
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    ours = {path.stem for path in ROOT.glob("*") if path.suffix == ".py" or path.is_dir()}
    foreign = {module.split(".")[0] for module in modules} - ours - sys.stdlib_module_names
    distributions = packages_distributions()
    names = {distributions.get(module, [module])[0] for module in foreign}
    imported = {name.lower().replace("_", "-") for name in names}
    assert {"xgrammar", "alt-profanity-check", "langdetect"} <= imported
    installed = {**pins("requirements-core.txt"), **pins("requirements.txt")}
    optional = {**pins("requirements-gpu.txt"), "ray": pins("requirements-cluster.txt")["ray"]}
    assert imported - set(installed) - set(optional) == set()
    # The demo's packages are in a file of their own.
    page = (ROOT / "docs" / "timeline.md").read_text()
    (row,) = (line for line in page.splitlines() if "`python demo_ui.py`" in line)
    assert "gradio" not in installed and "`pip install -r requirements-demo.txt`, " in row


def test_setup_installs_again_only_what_changed(tmp_path):
    """Run setup.sh with a fake Python; an included file counts as part of its includer."""
    for name in ("requirements-core.txt", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "setup.sh"
    script.write_text((ROOT / "scripts" / "setup.sh").read_text())
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in\n'
        f"*venv*) mkdir -p .venv/bin; cp {fake} .venv/bin/python ;;\n"
        f'*install*) for last in "$@"; do :; done; echo "$last" >>{tmp_path}/installed ;;\nesac\n'
    )
    for path in (fake, script):
        path.chmod(0o755)

    def setup() -> list[str]:
        installed = tmp_path / "installed"
        installed.unlink(missing_ok=True)
        command = ["sh", str(script), "requirements.txt"]
        environment = {**one_thread(), "PYTHON": str(fake), "TORCH_BUILD": "cuda"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return installed.read_text().split() if installed.exists() else []

    core, full = "requirements-core.txt", "requirements.txt"
    assert setup() == [core, full] and setup() == []
    with open(tmp_path / full, "a") as file:
        file.write("x==1\n")
    assert setup() == [full] and setup() == []
    with open(tmp_path / core, "a") as file:
        file.write("y==1\n")
    assert setup() == [core, full] and setup() == []

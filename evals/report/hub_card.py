"""The model card of a repository on the hub, from a checkpoint, its logs and its results.

The card names data sets and base models by their hub names and has no path of this machine.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.sources import CONVERSATIONS, HUB, HUB_SOURCES, PAIRS
from data.decontamination.benchmarks import HUB as TEST_SETS
from evals.engines import folder_hash
from evals.report.build import measured, scores
from evals.report.metric_names import COLUMNS
from evals.report.model_card import (
    PHASE_HEAD,
    SCORE_HEAD,
    RunRecord,
    describe,
    markdown_table,
    read_run,
    score_rows,
    training_rows,
)
from evals.report.page import change
from export.hub_files import MARK
from files import read_object
from models.hf import config_json, read_hf_config
from models.hf_experts import OWN_TYPE

ORIGIN = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}")  # of a hub source in a manifest
CACHED = re.compile(r"models--([^/]+?)--([^/]+)")  # folder of a model in the hub's cache
ENGLISH = {
    source.repo for sources in (HUB_SOURCES, CONVERSATIONS, PAIRS) for source in sources.values()
}
DATA_HEAD = ("source", "data set", "licence", "documents", "kept", "tokens")
STAGE_HEAD = ("stage", "data", "validation loss", "pairs preferred, %")


@dataclass(frozen=True)
class Choices:
    """What only the owner of a model knows; None or () if not stated."""

    license: str | None = None
    languages: tuple[str, ...] = ()
    base_model: str | None = None


class Source(NamedTuple):
    """A source of the training data."""

    name: str  # in data.mix
    repo: str | None  # data set on the hub; None for other text
    licence: str = ""
    counts: tuple[Any, ...] = ()  # documents, kept documents and tokens


def hub_card(
    folder: Path,
    repo: str,
    template: str | None,
    files: Mapping[str, int],
    logs: Path,
    results: Path,
    choices: Choices,
) -> tuple[str, list[str]]:
    """Return the card of a checkpoint, and notes on what it lacks.

    files: name -> bytes. logs, results: of the run; a section without input says so.
    """
    from huggingface_hub import ModelCardData

    run, name = read_run(logs, folder), repo.partition("/")[2]
    evaluations = measured(results, folder_hash(folder))[0] if results.is_dir() else {}
    text_sources, chat_sources = list(pretraining_sources(run)), list(tuning_sources(run))
    datasets = list(dict.fromkeys(s.repo for s in [*text_sources, *chat_sources] if s.repo))
    base, notes = _base_model(run, choices)
    languages = list(choices.languages)
    if (
        not languages
        and datasets
        and set(datasets) <= ENGLISH
        and len(datasets) == len({source.name for source in [*text_sources, *chat_sources]})
    ):
        languages = ["en"]
    own_type = config_json(folder).get("model_type") == OWN_TYPE
    has_gguf = any(file.endswith(".gguf") for file in files)
    results_index = list(_index(evaluations))
    data = ModelCardData(
        license=choices.license,
        language=languages or None,
        library_name=None if own_type else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        datasets=datasets or None,
        tags=["nanollama", *(["conversational"] if template else []), *(["gguf"] * has_gguf)],
        model_name=name if results_index else None,
        eval_results=results_index or None,
    )
    missing = {
        "a license (--license ID)": choices.license,
        "languages (--language CODE ...)": languages,
        f"training data (no logs in {logs})": run.phases,
        f"scores (no results of this checkpoint in {results})": evaluations,
    }
    notes += [f"the card states no {what}" for what, value in missing.items() if not value]
    sections = [
        f"---\n{data.to_yaml()}\n---\n{MARK}\n# {name}\n",
        describe(read_hf_config(folder), template) + "\n",
        f"## Use\n\n{_use(repo, template, files, own_type)}",
        "## Files\n\n"
        + markdown_table(
            ("file", "MB"),
            (
                (file, f"{size / 1e6:.1f}")
                for file, size in files.items()
                if file.endswith((".safetensors", ".gguf"))
            ),
        ),
        f"## Training\n\n{_started(base)}{_phases(run) or _none('training logs')}",
        f"## Data\n\n{markdown_table(DATA_HEAD, _data_rows(text_sources))}" if text_sources else "",
        "## Scores\n\n" + (markdown_table(SCORE_HEAD, score_rows(evaluations)) or _none("results")),
        "## License\n\n"
        + (
            f"{choices.license}. The terms of the training data apply too.\n"
            if choices.license
            else "The owner has not stated a license.\n"
        ),
    ]
    return "\n".join(section for section in sections if section), notes


def _none(what: str) -> str:
    return f"No {what} were found when this card was written.\n"


def _started(base: str | None) -> str:
    return f"Started from [{base}](https://huggingface.co/{base}).\n\n" if base else ""


def _phases(run: RunRecord) -> str:
    stages = markdown_table(STAGE_HEAD, _stage_rows(run))
    return "\n".join(filter(None, [markdown_table(PHASE_HEAD, training_rows(run.phases)), stages]))


def pretraining_sources(run: RunRecord) -> Iterator[Source]:
    """Yield the sources of the pretraining mixtures, with the records of their stores."""
    tuned = {stage["name"] for stage in run.tuned}
    named: dict[tuple[Path, str], None] = {}
    for phase, settings in run.phases.items():
        data = settings.get("data") or {}
        if phase not in tuned and data.get("store"):
            named |= dict.fromkeys((Path(data["store"]), name) for name in data.get("mix") or {})
    for store, name in named:
        manifest = read_object(store / "documents" / name / "manifest.json") or {}
        report = (read_object(store / "report.json") or {}).get("sources", {}).get(name, {})
        match = ORIGIN.fullmatch(str(manifest.get("origin", "")))
        counts = tuple(report.get(key) for key in ("documents", "kept", "train_tokens"))
        yield Source(name, match[1] if match else None, manifest.get("licence", ""), counts)


def tuning_sources(run: RunRecord) -> Iterator[Source]:
    """Yield the sources of SFT and DPO that their mixtures name."""
    for stage in run.tuned:
        for name, path in stage["sources"].items():
            if name in stage["mix"]:
                yield Source(name, _hub_name(str(path)))


def _hub_name(path: str) -> str | None:
    """Return owner/name of an address hf://owner/name@revision; None for a local path."""
    return path.removeprefix(HUB).partition("@")[0] if path.startswith(HUB) else None


def _base_model(run: RunRecord, choices: Choices) -> tuple[str | None, list[str]]:
    """Return the hub name of the foreign model that the run started from, and notes about it."""
    tuned = {stage["name"] for stage in run.tuned}
    pretrained = [settings for phase, settings in run.phases.items() if phase not in tuned]
    first = pretrained[0].get("init_from") if pretrained else None
    if not pretrained and run.tuned:
        first = run.tuned[0]["started_from"]
    cached = CACHED.search(str(first))
    base = choices.base_model or (f"{cached[1]}/{cached[2]}" if cached else None)
    if first and not base:
        return None, [f"the run started from {first}; if it is on the hub, give --base_model"]
    return base, []


def _data_rows(sources: list[Source]) -> Iterator[tuple[Any, ...]]:
    for source in sources:
        counts = (f"{n:,}" if isinstance(n, int) else "" for n in source.counts)
        yield source.name, source.repo or "", source.licence, *counts


def _stage_rows(run: RunRecord) -> Iterator[tuple[Any, ...]]:
    for stage in run.tuned:
        names = (
            _hub_name(str(path)) or name
            for name, path in stage["sources"].items()
            if name in stage["mix"]
        )
        losses = change([row["loss"] for row in stage["held_out"]], 3)
        shares = change([100 * row["share"] for row in stage["preferred"]], 1)
        yield stage["name"], ", ".join(names), losses, shares


def _index(evaluations: dict[str, dict[str, Any]]) -> Iterator[Any]:
    """Yield model-index entries of the scores on public test sets, in percent or of 10."""
    from huggingface_hub import EvalResult

    for column, score in scores(evaluations).items():
        if column in TEST_SETS and score["n"] is not None:
            test_set = TEST_SETS[column]
            metric = score["metric"].removeprefix(f"{column}_").removeprefix("challenge_")
            n = score["n"]
            yield EvalResult(
                task_type="text-generation",
                dataset_type=test_set.repository,
                dataset_name=COLUMNS[column][0],
                dataset_config=test_set.config,
                metric_type=metric,
                metric_name=f"{metric}, {score['shots']}-shot, n {n:,}",
                metric_value=round(score["value"], 2),
                metric_args={"num_fewshot": score["shots"], "n": n, "stderr": score["stderr"]},
            )


def _use(repo: str, template: str | None, files: Mapping[str, int], own_type: bool) -> str:
    """Return commands that run the model."""
    prompt = '[{"role": "user", "content": "Hello"}]' if template else '"Once upon a time"'
    parts = []
    if own_type:
        parts.append("Only NanoLlama reads this form of experts; transformers does not.\n")
    else:
        parts.append(
            "```python\nfrom transformers import pipeline\n\n"
            f'generate = pipeline("text-generation", "{repo}")\n'
            f"print(generate({prompt}, max_new_tokens=256))\n```\n"
        )
    ggufs = [file for file in files if file.endswith(".gguf")]
    if ggufs:
        parts.append(
            f"```\nllama-server --hf-repo {repo} --hf-file {ggufs[-1]}\n"
            f"ollama run hf.co/{repo}:{ggufs[-1]}\n```\n"
        )
    return "\n".join(parts)

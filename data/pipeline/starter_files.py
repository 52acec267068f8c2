"""Read one's own text into a store and write a starter recipe and training config for it."""

import re
import shlex
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from data.corpus.documents import LongDocumentError
from data.corpus.ingest import MAX_BAD, ingest, open_reader, source_name
from data.corpus.local_files import TEXT_SUFFIXES
from data.corpus.readers import FileReader, Reader
from data.pipeline import starter
from data.pipeline.recipe import Split
from data.pipeline.starter import SourceSize, Vocabulary

PIECE_NOTE = "held-out pieces come from the files that training reads, so scores look a bit better"


@dataclass(frozen=True)
class ReadSettings:
    """How new_recipe reads each source: the flags of the same names of download_data."""

    max_tokens: float
    text_column: str | None = None
    id_column: str | None = None
    split: str | None = None
    document_chars: int | None = None  # None: text files are cut if necessary
    max_bad: float = MAX_BAD

    def flags(self) -> list[str]:
        """Return the flags of download_data that read a source in the same way."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        if self.max_bad == MAX_BAD:
            del given["max_bad"]
        texts = {key: f"{v:.15g}" if isinstance(v, float) else v for key, v in given.items()}
        return [word for key, value in texts.items() for word in (f"--{key}", str(value))]


@dataclass(frozen=True)
class Source:
    """A source in the store. settings: how it was read, with the length of cut documents."""

    name: str
    path: str
    size: SourceSize
    settings: ReadSettings


@dataclass(frozen=True)
class Starter:
    """A chosen recipe. train_bytes: source -> UTF-8 bytes that are not held out."""

    store: Path
    sources: tuple[Source, ...]
    val_fraction: float
    train_bytes: dict[str, int]
    vocabulary: Vocabulary
    wanted_vocabulary: bool
    steps: int
    tokens_per_step: int

    @property
    def size(self) -> int:
        """UTF-8 bytes of all text."""
        return sum(source.size.size for source in self.sources)

    @property
    def tokens(self) -> float:
        """Estimated training tokens, before filters."""
        return sum(self.train_bytes.values()) / self.vocabulary.bytes_per_token

    @property
    def epochs(self) -> float:
        """Epochs of the training run."""
        return self.steps * self.tokens_per_step / self.tokens

    def summary(self) -> str:
        """Describe the choice in one sentence."""
        return (
            f"a vocabulary of {self.vocabulary.size:,}, {self.val_fraction:.0%} of the documents "
            f"held out, {self.steps:,} steps of {self.tokens_per_step:,} tokens: about "
            f"{self.epochs:.2g} epochs of {self.tokens / 1e6:,.2g}M tokens"
        )


def named_sources(paths: list[str]) -> dict[str, str]:
    """Return a source name for each path; equal names get a number.

    An existing path precedes the known source of that name: it becomes ./path.
    """
    named: dict[str, str] = {}
    for path in paths:
        if re.fullmatch(r"[\w-]+", path) and Path(path).exists():
            path = f"./{path}"
        first = source_name(path) or "text"
        name, number = first, 2
        while name in named:
            name, number = f"{first}_{number}", number + 1
        named[name] = path
    return named


def read_sources(store: Path, paths: dict[str, str], settings: ReadSettings) -> tuple[Source, ...]:
    """Read each source into the store, up to about max_tokens tokens, and print its size.

    Text files of a source are cut into pieces if one is too long for a document, or if they are too
    few to hold some out.
    """

    def read(name: str, chars: int | None) -> tuple[Reader, SourceSize]:
        columns = settings.text_column, settings.id_column
        _, reader = open_reader(paths[name], store, name, None, *columns, settings.split, chars)
        ingest(reader, store, name, settings.max_tokens, max_bad=settings.max_bad)
        return reader, starter.source_size(starter.source_texts(store, name))

    def read_in_pieces(name: str, why: str, chars: int) -> tuple[Reader, SourceSize]:
        print(
            f"{name}: {why}; cutting .txt and .md files at empty lines into documents of about "
            f"{chars:,} bytes",
            flush=True,
        )
        return read(name, chars)

    sources = []
    for name, path in paths.items():
        chars = settings.document_chars
        try:
            reader, size = read(name, chars)
        except LongDocumentError as error:
            chars, why = starter.PIECE_CHARS[1], str(error).partition(";")[0]
            reader, size = read_in_pieces(name, why, chars)
        few = starter.choose_fraction([size]) is None and _has_text_files(reader)
        if few and settings.document_chars is None:
            chars = starter.piece_chars(size.size)
            why = f"too few documents to hold some out ({size.documents:,})"
            reader, size = read_in_pieces(name, why, chars)
        print(f"{name:>16} {size.documents:>10,} documents {size.size / 1e6:>10,.2f} MB")
        if size.size >= settings.max_tokens * reader.bytes_per_token:
            print(
                f"{name}: the limit of --max_tokens {settings.max_tokens:g} is reached; more is "
                "not read"
            )
        sources.append(Source(name, path, size, replace(settings, document_chars=chars)))
    return tuple(sources)


def _has_text_files(reader: Reader) -> bool:
    return isinstance(reader, FileReader) and any(
        name.lower().endswith(TEXT_SUFFIXES) for name in reader.files
    )


def starter_recipe(
    store: Path,
    sources: tuple[Source, ...],
    vocab_size: int | None,
    tokens_per_step: int,
    max_steps: int,
) -> Starter:
    """Choose a recipe for the sources of a store; ValueError if they have too little text."""
    fraction = _held_out_fraction(sources)
    split, number = Split(fraction), starter.FRACTIONS.index(fraction)
    texts = [
        (text for id_, text in starter.source_texts(store, source.name) if split.of(id_) == "train")
        for source in sources
    ]
    train_bytes = {
        source.name: source.size.size - source.size.held_out[number][1] for source in sources
    }
    total = sum(train_bytes.values())
    vocabulary = starter.choose_vocabulary(texts, total, vocab_size)
    tokens = total / vocabulary.bytes_per_token
    steps = starter.choose_steps(tokens, tokens_per_step, max_steps)
    wanted = vocab_size is not None
    return Starter(
        *(store, sources, fraction, train_bytes, vocabulary, wanted, steps, tokens_per_step)
    )


def _held_out_fraction(sources: tuple[Source, ...]) -> float:
    """Return the held-out share; ValueError if there is too little text."""
    total = sum(source.size.size for source in sources)
    if total < starter.LEAST_BYTES:
        raise ValueError(
            f"{', '.join(source.path for source in sources)}: {total / 1e3:,.1f} kB of text are "
            f"too little to train a model; add text, at least {starter.LEAST_BYTES / 1e3:,.0f} kB"
        )
    fraction = starter.choose_fraction([source.size for source in sources])
    if fraction is None:
        least = min(sources, key=lambda source: source.size.choices())
        raise ValueError(
            f"{least.path}: no share of its {least.size.documents:,} documents "
            f"({least.size.size / 1e3:,.1f} kB) can be held out for validation (at least "
            f"{starter.LEAST_HELD_OUT / 1e3:g} kB, at most {starter.MOST_HELD_OUT:.0%}); add "
            "documents, split long ones, or leave it out"
        )
    return fraction


def recipe_text(choice: Starter, about: str) -> str:
    """Return the recipe as YAML with reasons."""
    name = choice.store.name
    large = choice.size >= starter.LARGE
    number = starter.FRACTIONS.index(choice.val_fraction)
    held_out = ", ".join(
        f"{source.name} {source.size.held_out[number][0]:,} documents with "
        f"{source.size.held_out[number][1] / 1e3:,.0f} kB"
        for source in choice.sources
    )
    lines = [f"# python -m scripts.prepare_data --config configs/data/{name}.yaml"]
    lines += [f"# {about}", "# After a change of the text, run this and then the command above:"]
    for source in choice.sources:
        words = ["--dataset", source.path, "--name", source.name, *source.settings.flags()]
        words += ["--output_dir", choice.store.as_posix()]
        lines.append(f"# python -m scripts.download_data {shlex.join(words)}")
    lines.append(f"store: {choice.store.as_posix()}")
    lines += _comment(f"The smallest share that holds out enough: {held_out}.")
    if any(source.settings.document_chars for source in choice.sources):
        lines += _comment(f"Long files are cut into documents; {PIECE_NOTE}.")
    lines.append(f"val_fraction: {choice.val_fraction:g}")
    vocabulary = choice.vocabulary
    rule = (
        f"learned tokens occurring {starter.FREQUENT} times or more in the training text, here "
        f"{vocabulary.frequent:.0%}"
    )
    if choice.wanted_vocabulary:
        lines += _comment(f"Given by --vocab_size. Share of the {rule}.")
    else:
        lines += _comment(
            f"The largest of {', '.join(f'{size:,}' for size in starter.VOCABULARIES)} with at "
            f"least {starter.FREQUENT_SHARE:.0%} of the {rule} (arXiv:2004.02334). Else the "
            "smallest."
        )
    lines += _comment(f"model.vocab_size of configs/{name}.yaml is the same number.")
    lines += [f"tokenizer: {{vocab_size: {vocabulary.size}}}", "sources:"]
    if large:
        lines += _comment("From 100 MB on: removes texts that repeat themselves.", 2)
        settings = "{min_chars: 100, filters: [gopher_repetition]}"
    else:
        lines += _comment(
            "No filters: those of web text would remove much of a small corpus. Others: language, "
            "filters, mask_pii (docs/data.md).",
            2,
        )
        settings = "{}"
    lines += [f"  {_key(source.name)}: {settings}" for source in choice.sources]
    if large:
        lines += _comment("Near-duplicates and documents with benchmark items are removed.")
        lines.append("dedup: {kind: minhash}")
        lines.append("decontaminate: {test_sets: [mmlu, gsm8k, hellaswag, arc]}")
    else:
        lines += _comment(
            "Only equal texts are removed. Benchmark items are not searched: that would remove "
            "texts that a benchmark quotes. For scores on benchmarks: [mmlu, gsm8k, hellaswag, arc]"
        )
        lines += ["dedup: {kind: exact}", "decontaminate: {test_sets: []}"]
    return "\n".join(lines) + "\n"


def config_text(choice: Starter, about: str) -> str:
    """Return the training config as YAML with reasons."""
    name, steps = choice.store.name, choice.steps
    total = sum(choice.train_bytes.values())
    mix = {name: round(size / total, 3) or 0.001 for name, size in choice.train_bytes.items()}
    every = max(10, steps // 4)
    lines = [f"# python train.py --config configs/{name}.yaml", f"# {about}"]
    lines += _comment(
        "The quickstart's model of a few million parameters. docs/own_data.md has smaller and "
        "larger ones."
    )
    lines += ["extends: quickstart/base.yaml", f"run: {_key(name)}"]
    lines += _comment(
        f"About {choice.epochs:.2g} epochs; up to {starter.MAX_EPOCHS}, repeated tokens are nearly "
        "as good as new ones (arXiv:2305.16264). --minutes of scripts.new_recipe limits them; to "
        "train longer, raise steps and schedule.total_steps together."
    )
    lines.append(f"steps: {steps}")
    lines.append(f"model: {{vocab_size: {choice.vocabulary.size}}}  # that of the recipe")
    lines += ["data:", f"  store: {choice.store.as_posix()}", "  # in proportion to the text"]
    lines.append(f"  mix: {{{', '.join(f'{_key(key)}: {share}' for key, share in mix.items())}}}")
    warmup, decay = min(20, steps // 4), max(1, steps // 5)
    lines.append(
        f"schedule: {{warmup_steps: {warmup}, total_steps: {steps}, decay_steps: {decay}}}"
    )
    lines.append(f"checkpoint: {{every: {every}}}")
    lines.append(f"validation: {{every: {every}}}")
    lines.append(f"startup: {{steps: {min(50, steps)}}}")
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: int = 0) -> list[str]:
    prefix = " " * indent + "# "
    return textwrap.wrap(
        text,
        100,
        initial_indent=prefix,
        subsequent_indent=prefix,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _key(name: str) -> str:
    """Return a name as YAML, in quotes where YAML would read it as another value."""
    return str(yaml.safe_dump(name)).splitlines()[0]

"""The recipe that scripts/prepare_data.py reads: settings of the pipeline steps and executor."""

import difflib
import hashlib
from dataclasses import dataclass, field
from typing import Annotated

from ranges import Fraction, NonEmptyText, NonNegativeInt, PositiveInt, at_least, check_fields

RULES = ("exact", "coverage", "13-gram")
FILTERS = ("gopher_repetition", "gopher_quality", "fineweb_quality", "c4_quality")


class Split:
    """Assigns val_fraction of the documents to validation, by a hash of only the document id."""

    def __init__(self, val_fraction: float):
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} must be at least 0 and below 1")
        self.val_fraction = val_fraction

    def of(self, document_id: str) -> str:
        """Return "train" or "val"."""
        hashed = int.from_bytes(
            hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "big"
        )
        return "val" if hashed < self.val_fraction * 2**64 else "train"


@dataclass(frozen=True)
class CleanConfig:
    """A source's filters in the order of application, and the masking of personal data."""

    min_chars: PositiveInt = 1
    max_chars: PositiveInt | None = None
    # ISO 639-1 code, by fastText's lid.176 on the first 2,000 characters; None: any language
    language: str | None = None
    min_language_score: Annotated[float, at_least(0, maximum=1)] = 0.65  # FineWeb's threshold
    filters: tuple[str, ...] = ()  # of FILTERS: datatrove's, with their papers' thresholds
    mask_pii: bool = False  # replace e-mail and public IP addresses

    def __post_init__(self) -> None:
        check_fields(self, "source")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(
                f"max_chars={self.max_chars} must not be below min_chars={self.min_chars}"
            )
        for name in self.filters:
            if name not in FILTERS:
                close = difflib.get_close_matches(name, FILTERS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(FILTERS)}"
                raise ValueError(f"unknown filter {name!r}; {hint}")


@dataclass(frozen=True)
class DedupConfig:
    """Removes duplicates of earlier documents, across all sources in the recipe's order.

    minhash: near-duplicates by the Jaccard similarity of word n-grams. A pair of similarity s is
    detected with probability 1-(1-s^hashes)^buckets: 0.92 at 0.8, 0.56 at 0.7. exact: only equal
    texts. Both detect every pair of equal texts.
    """

    kind: str = "minhash"  # or exact, none
    ngram: Annotated[int, at_least(1, maximum=1000)] = 5  # words
    buckets: Annotated[int, at_least(1, maximum=1000)] = 14
    hashes: Annotated[int, at_least(1, maximum=1000)] = 8  # per bucket

    def __post_init__(self) -> None:
        check_fields(self, "dedup")
        if self.kind not in ("minhash", "exact", "none"):
            raise ValueError(f"dedup.kind={self.kind!r} must be minhash, exact or none")


@dataclass(frozen=True)
class DecontaminateConfig:
    """The benchmarks to search for and the action on a hit: drop the document, cut it, or keep it.

    The rules exact, coverage and 13-gram are in data/decontamination/index.py. Famous quotations in
    test items (the Declaration of Independence in MMLU) match only the 13-gram rule;
    by_rule: {13-gram: cut} keeps documents that quote them.
    """

    # names or paths, see data/decontamination/test_sets.py; [] for none
    test_sets: tuple[str, ...] = ("mmlu", "gsm8k", "hellaswag", "arc")
    action: str = "drop"
    by_rule: dict[str, str] = field(default_factory=dict)  # rule -> action; default: `action`

    def __post_init__(self) -> None:
        for rule, action in (("action", self.action), *self.by_rule.items()):
            if rule not in ("action", *RULES):
                raise ValueError(
                    f"decontaminate.by_rule.{rule}: unknown rule; known: {', '.join(RULES)}"
                )
            if action not in ("drop", "cut", "keep"):
                raise ValueError(f"decontaminate: {rule}={action!r} must be drop, cut or keep")


@dataclass(frozen=True)
class ExecutorConfig:
    """Where tasks run, one per part of the documents. Every executor gives the same output."""

    kind: str = "local"  # local, slurm or ray
    workers: NonNegativeInt = 0  # concurrent tasks; 0: one per core (local), no limit (slurm, ray)
    memory_gb: PositiveInt = 4  # per task, slurm and ray
    partition: str | None = None  # slurm
    hours: PositiveInt = 24  # slurm: time limit of a task
    ray_address: str | None = None  # "auto" or host:port of a cluster; None: start a local one

    def __post_init__(self) -> None:
        check_fields(self, "executor")
        if self.kind not in ("local", "slurm", "ray"):
            raise ValueError(f"executor.kind={self.kind!r} must be local, slurm or ray")
        if self.kind == "slurm" and not self.partition:
            raise ValueError("executor.kind=slurm needs executor.partition; `sinfo` lists them")


@dataclass(frozen=True)
class TokenizerConfig:
    """The BPE tokenizer to train, or a public vocabulary or a model's tokenizer to use."""

    # includes the special tokens and the 256 bytes
    vocab_size: Annotated[int, at_least(1, below=2**31)] = 32_000
    sample_megabytes: PositiveInt = 1_000  # training text, in equal shares from the sources
    public: str | None = None  # gpt2, cl100k_base or o200k_base, used unchanged instead of training
    folder: str | None = None  # model folder whose tokenizer is used unchanged instead of training

    def __post_init__(self) -> None:
        check_fields(self, "tokenizer")
        if self.public and self.folder:
            raise ValueError("tokenizer.public and tokenizer.folder exclude each other; give one")


@dataclass(frozen=True)
class Recipe:
    """Settings of one data store."""

    store: NonEmptyText  # reads documents/<source>/, writes tokenizer/ and tokens/<source>/
    sources: dict[str, CleanConfig]
    val_fraction: Fraction = 0.02  # validation share of each source's documents
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.sources:
            raise ValueError("sources is empty; list at least one: sources: {name: {}, ...}")

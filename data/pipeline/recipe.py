"""What becomes of a store's documents, as scripts/prepare_data.py reads it from YAML: the steps and who runs them."""

import difflib
import hashlib
from dataclasses import dataclass, field
from typing import Annotated

from ranges import FilledText, Fraction, NonNegativeInt, PositiveInt, at_least, check_fields

RULES = ("exact", "coverage", "13-gram")
FILTERS = ("gopher_repetition", "gopher_quality", "fineweb_quality", "c4_quality")


class Split:
    """Which documents are held out: a share of them, by a hash of the id, the same whatever else changes."""

    def __init__(self, val_fraction: float):
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} must be at least 0 and below 1")
        self.val_fraction = val_fraction

    def of(self, document_id: str) -> str:
        """ "train" or "val"."""
        hashed = int.from_bytes(
            hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "big"
        )
        return "val" if hashed < self.val_fraction * 2**64 else "train"


@dataclass(frozen=True)
class CleanConfig:
    """What a document of a source must be, in the order it is asked; then what is masked in it."""

    min_chars: PositiveInt = 1
    max_chars: PositiveInt | None = None
    language: str | None = (
        None  # ISO 639-1 code, judged by fastText's lid.176 on the first 2,000 characters; None: any
    )
    min_language_score: Annotated[float, at_least(0, most=1)] = 0.65  # as FineWeb has it
    filters: tuple[str, ...] = ()  # of FILTERS: datatrove's, with the thresholds of their papers
    mask_pii: bool = False  # e-mail and public IP addresses are replaced

    def __post_init__(self) -> None:
        check_fields(self, "source")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(
                f"max_chars={self.max_chars} must not be below min_chars={self.min_chars}"
            )
        for name in self.filters:
            if name not in FILTERS:
                close = difflib.get_close_matches(name, FILTERS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(FILTERS)}"
                raise ValueError(f"{name!r} is not a filter; {hint}")


@dataclass(frozen=True)
class DedupConfig:
    """Documents equal to, or much like, an earlier one are dropped, over all sources of the recipe in its order.

    minhash: Jaccard similarity of word n-grams; a pair of similarity s is found with probability 1-(1-s^hashes)^buckets:
    0.92 at 0.8, 0.56 at 0.7. exact: equal texts only. Equal texts are always found by either.
    """

    kind: str = "minhash"  # minhash, exact or none
    ngram: Annotated[int, at_least(1, most=1000)] = 5  # words
    buckets: Annotated[int, at_least(1, most=1000)] = 14
    hashes: Annotated[int, at_least(1, most=1000)] = 8  # a bucket

    def __post_init__(self) -> None:
        check_fields(self, "dedup")
        if self.kind not in ("minhash", "exact", "none"):
            raise ValueError(f"dedup.kind={self.kind!r} must be minhash, exact or none")


@dataclass(frozen=True)
class DecontaminateConfig:
    """Which test sets are looked for, and what is done where an item is found: drop the document, cut the span, or keep it.

    The rules are those of data/decontamination/index.py: exact, coverage, 13-gram. What a set quotation shares with a test item
    (the Declaration of Independence, in MMLU) is found by 13-gram alone, so by_rule: {13-gram: cut} spares such documents.
    """

    test_sets: tuple[str, ...] = (
        "mmlu",
        "gsm8k",
        "hellaswag",
        "arc",
    )  # names or paths, see data/decontamination/test_sets.py; [] for none
    action: str = "drop"
    by_rule: dict[str, str] = field(
        default_factory=dict
    )  # rule -> action, where it is not `action`

    def __post_init__(self) -> None:
        for rule, action in (("action", self.action), *self.by_rule.items()):
            if rule not in ("action", *RULES):
                raise ValueError(
                    f"decontaminate.by_rule.{rule} is no rule; there are {', '.join(RULES)}"
                )
            if action not in ("drop", "cut", "keep"):
                raise ValueError(f"decontaminate: {rule}={action!r} must be drop, cut or keep")


@dataclass(frozen=True)
class ExecutorConfig:
    """Who runs the tasks, one a part of the documents. The steps and what they write are the same everywhere."""

    kind: str = "local"  # local, slurm or ray
    workers: NonNegativeInt = 0  # tasks at once; 0: one a core (local), no limit (slurm, ray)
    memory_gb: PositiveInt = 4  # of a task, slurm and ray
    partition: str | None = None  # slurm
    hours: PositiveInt = 24  # slurm: the limit of a task
    ray_address: str | None = None  # "auto" or host:port of a running cluster; None starts one here

    def __post_init__(self) -> None:
        check_fields(self, "executor")
        if self.kind not in ("local", "slurm", "ray"):
            raise ValueError(f"executor.kind={self.kind!r} must be local, slurm or ray")
        if self.kind == "slurm" and not self.partition:
            raise ValueError("executor.kind=slurm needs executor.partition; `sinfo` lists them")


@dataclass(frozen=True)
class TokenizerConfig:
    vocab_size: Annotated[int, at_least(1, below=2**31)] = (
        32_000  # special tokens and the 256 bytes included
    )
    sample_megabytes: PositiveInt = (
        1_000  # of text it is trained on, in equal parts from the sources
    )
    public: str | None = (
        None  # gpt2, cl100k_base or o200k_base: that vocabulary as it is, none is trained
    )

    def __post_init__(self) -> None:
        check_fields(self, "tokenizer")


@dataclass(frozen=True)
class Recipe:
    store: FilledText  # folder with documents/<source>/, where tokenizer/ and tokens/<source>/ are written
    sources: dict[str, CleanConfig]
    val_fraction: Fraction = 0.02  # of each source's documents, held out
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.sources:
            raise ValueError("the recipe names no sources; write sources: {name: {}, ...}")

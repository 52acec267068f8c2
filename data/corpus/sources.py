"""The sets of the full-size plan on the Hugging Face hub: where each lies, which commit, under what licence.

A revision is a commit of the data set's repository, so that the same command gives the same text years later. Where --revision
names a branch instead, its commit is resolved at the first download, kept in the manifest and used by every later run.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from data.corpus.stem_filter import is_stem


class Document(NamedTuple):
    id: str
    text: str


@dataclass(frozen=True)
class HubSource:
    """One source on the hub. bytes_per_token is of a 32,000-token byte-level BPE on such text, for budgets: an estimate."""

    repo: str  # on the hub, or a local folder laid out like it
    revision: str  # commit, branch or tag
    files: str  # pattern inside the repository, .parquet or .json(l).gz
    licence: str
    about: str
    bytes_per_token: float
    text_column: str = "text"
    id_column: str | None = None  # None: <repo>/<row>
    keep: Callable[[str], bool] | None = None  # of the text; which documents are taken
    gated: bool = False


HUB_SOURCES = {
    "fineweb_edu": HubSource(
        "HuggingFaceFW/fineweb-edu",
        "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        "sample/100BT/*.parquet",
        "ODC-By 1.0; Common Crawl's terms of use apply",
        "web pages of educational value, the sample of 100 billion tokens",
        4.5,
        id_column="id",
    ),
    "pg19": HubSource(
        "emozilla/pg19",
        "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8",
        "data/train-*.parquet",
        "Apache-2.0 (the set); its books are in the public domain in the USA",
        "books of Project Gutenberg from before 1919, the training split of PG-19 as parquet",
        4.2,
        id_column="url",
    ),
    "the_stack_python": HubSource(
        "bigcode/the-stack-dedup",
        "17cad72c886a2858e08d4c349a00d6466f54df63",
        "data/python/*.parquet",
        "The Stack's terms of use; each file keeps its own permissive licence",
        "Python files of GitHub, near-duplicates removed",
        3.5,
        text_column="content",
        id_column="hexsha",
        gated=True,
    ),
    "open_web_math": HubSource(
        "open-web-math/open-web-math",
        "fde8ef8de2300f5e778f56261843dab89f230815",
        "data/*.parquet",
        "ODC-By 1.0; Common Crawl's terms of use apply",
        "web pages with mathematics",
        3.5,
        id_column="url",
    ),
    "stackexchange": HubSource(
        "common-pile/stackexchange_filtered",
        "c0ac7373830c688a43fc12d1988c4b19ccd884ab",
        "*.json.gz",
        "CC BY-SA 2.5, 3.0 or 4.0, by the date of each post",
        "questions of the Stack Exchange sites with their answers and comments, as of the Common Pile",
        3.8,
        id_column="id",
    ),
    "stem_wiki": HubSource(
        "HuggingFaceFW/finewiki",
        "8bd13e72e6a002407649b3e898535f42ceb1aeb9",
        "data/enwiki/*.parquet",
        "CC BY-SA 4.0 (text of Wikipedia)",
        "English Wikipedia of August 2025 with its formulas, articles on science, technology and mathematics",
        4.4,
        id_column="id",
        keep=is_stem,
    ),
}

GROUPS = {  # names that stand for several sources
    "pg19_and_stack_mixed": ("pg19", "the_stack_python"),
    "gold_sources_mixed": ("open_web_math", "stackexchange", "stem_wiki"),
}
HELD_OUT = "_validation"
HUB = "hf://"  # begins the address of any data set on the hub


def hub_files(address: str) -> tuple[str, str, str]:
    """Repository, file pattern and revision (default: main) of hf://owner/name/FILES@revision; ValueError for another form."""
    parts = re.fullmatch(r"([^/@]+/[^/@]+)/([^@]+)(?:@(.+))?", address.removeprefix(HUB))
    if not parts or not parts[2].endswith((".parquet", ".json", ".jsonl", ".gz", ".zst")):
        raise ValueError(
            f"{address} must name the files to read, .parquet or with a JSON object a line, as in "
            "hf://owner/name/data/train-*.parquet@revision; a split or a config of a data set is some of its files"
        )
    return parts[1], parts[2], parts[3] or "main"


def sources_of(name: str) -> tuple[str, ...]:
    """The sources that a name stands for, with hyphens as underscores; other names are returned as they are.

    fineweb-edu -> fineweb_edu, gold_sources_mixed -> its three members.
    """
    plain = name.lower().replace("-", "_")
    return GROUPS.get(plain) or ((plain,) if plain in HUB_SOURCES else (name,))


def held_out_of(name: str) -> tuple[str, ...]:
    """The sources whose held-out split a name ending in -validation means; none for any other name."""
    plain = name.lower().replace("-", "_")
    sources = sources_of(plain.removesuffix(HELD_OUT))
    return sources if plain.endswith(HELD_OUT) and set(sources) <= set(HUB_SOURCES) else ()

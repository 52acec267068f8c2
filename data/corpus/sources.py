"""The hub data sets of the full-size plan: repository, commit, files and licence.

A revision pins a commit of the data set's repository. A branch given by --revision is resolved to
its commit at the first download; the manifest records the commit for later runs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from data.corpus.stem_filter import is_stem


class Document(NamedTuple):
    """A text with an id that is unique within its source."""

    id: str
    text: str


@dataclass(frozen=True)
class HubSource:
    """A source on the hub. bytes_per_token: estimate for a 32,000-token byte-level BPE."""

    repo: str  # on the hub, or a local folder with the same layout
    revision: str  # commit, branch or tag
    files: str  # pattern within the repository, .parquet or .json(l).gz
    licence: str
    about: str
    bytes_per_token: float
    text_column: str = "text"
    id_column: str | None = None  # None: <repo>/<row>
    keep: Callable[[str], bool] | None = None  # selects documents by their text
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
        "questions of Stack Exchange sites with answers and comments, from the Common Pile",
        3.8,
        id_column="id",
    ),
    "stem_wiki": HubSource(
        "HuggingFaceFW/finewiki",
        "8bd13e72e6a002407649b3e898535f42ceb1aeb9",
        "data/enwiki/*.parquet",
        "CC BY-SA 4.0 (text of Wikipedia)",
        "English Wikipedia of August 2025 with formulas, articles on science, technology and "
        "mathematics",
        4.4,
        id_column="id",
        keep=is_stem,
    ),
}

GROUPS = {  # names of several sources together
    "pg19_and_stack_mixed": ("pg19", "the_stack_python"),
    "gold_sources_mixed": ("open_web_math", "stackexchange", "stem_wiki"),
}
VALIDATION_SUFFIX = "_validation"
HUB = "hf://"  # prefix of a hub data set's address


def hub_files(address: str) -> tuple[str, str, str]:
    """Split hf://owner/name/FILES@revision into repository, file pattern and revision.

    The default revision is main.
    """
    match = re.fullmatch(r"([^/@]+/[^/@]+)/([^@]+)(?:@(.+))?", address.removeprefix(HUB))
    if not match or not match[2].endswith((".parquet", ".json", ".jsonl", ".gz", ".zst")):
        raise ValueError(
            f"{address} must name the files to read, parquet or JSON lines, as in "
            "hf://owner/name/data/train-*.parquet@revision; a split or config is a subset of the "
            "files"
        )
    return match[1], match[2], match[3] or "main"


def sources_of(name: str) -> tuple[str, ...]:
    """Return the sources of a name; an unknown name is returned unchanged.

    Hyphens count as underscores. fineweb-edu -> fineweb_edu, gold_sources_mixed -> its three
    members.
    """
    plain = name.lower().replace("-", "_")
    return GROUPS.get(plain) or ((plain,) if plain in HUB_SOURCES else (name,))


def validation_sources(name: str) -> tuple[str, ...]:
    """Return the sources of a name that ends in -validation; () for any other name."""
    plain = name.lower().replace("-", "_")
    sources = sources_of(plain.removesuffix(VALIDATION_SUFFIX))
    return sources if plain.endswith(VALIDATION_SUFFIX) and set(sources) <= set(HUB_SOURCES) else ()

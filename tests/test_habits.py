"""Repository files: they parse, agree with each other, and name only what exists."""

import ast
import configparser
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_house
import yaml
from conftest import ROOT

GENERATED = "faults.md"  # written by benchmarks/faults.py
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != GENERATED]
# Other pages name files of a run, too.
REPOSITORY_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "docs/README.md", "docs/architecture.md")
SEMANTIC_VERSION = re.compile(r"(?<![\d.])\d+\.\d+\.\d+(?![\d.])")
PLACEHOLDER = re.compile(r"[A-Z]{4,}|step_N|eval_NAME|my_")  # `STORE/tokens/SOURCE/` and the like
CODE_BLOCK = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w.*-]+(/[\w.*-]+)+/?|[\w.-]+/|[\w.-]+\.(py|md|toml|txt|yaml|yml)")
SOURCE_FILE = re.compile(
    r"\b(?:benchmarks|configs|data|demo|docs|evals|export|inference|lab|models|scripts|tests|"
    r"training)/[\w/]+\.(?:md|py|sh|yaml)\b"
)
DEFINED = re.compile(r"([\w/]+\.py):(\w+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
README_SECTIONS = [
    "What you get",
    "Your hardware",
    "The 1.1B model on two H100",
    "Your own things",
    "Why this and not ...",
    "When something fails",
    "Documentation",
]
WRITTEN = ("checkpoints/", "logs/", "results/", "gguf/", "records/", "data/store/")  # by commands


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def project() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))["project"]


def workflow() -> dict[Any, Any]:
    return yaml.safe_load(read(".github/workflows/ci.yml"))


def steps() -> list[dict[str, Any]]:
    return [step for job in workflow()["jobs"].values() for step in job["steps"]]


def targets() -> set[str]:
    return set(re.findall(r"^(\w+):", read("Makefile"), flags=re.MULTILINE))


def without_code_blocks(text: str) -> str:
    return CODE_BLOCK.sub("", text)


def code_spans(text: str) -> list[str]:
    return CODE_SPAN.findall(without_code_blocks(text))


def missing_paths(text: str) -> list[str]:
    """Return code spans that look like paths but match no file, without a trailing `:name`."""
    missing = []
    for span in code_spans(text):
        path = DEFINED.sub(r"\1", span)
        if PATH.fullmatch(path) and not PLACEHOLDER.search(path) and path not in WRITTEN:
            exists = any(ROOT.glob(path.rstrip("/"))) if "*" in path else (ROOT / path).exists()
            if not exists:
                missing.append(path)
    return missing


def defined_names(source: str) -> set[str]:
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def missing_names(text: str) -> list[str]:
    """Return `file:name` spans whose file does not define the name at its top level."""
    matches = [match for span in code_spans(text) if (match := DEFINED.fullmatch(span))]
    return [match[0] for match in matches if match[2] not in defined_names(read(match[1]))]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code_blocks(text), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> list[str]:
    """Return links to files that are missing, or to headings that their page lacks."""
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        path = page.parent / name if name else page
        if "://" not in link and not (
            path.exists() and (not anchor or anchor in anchors(path.read_text(encoding="utf-8")))
        ):
            broken.append(link)
    return broken


def test_the_version_is_in_one_place():
    version = project()["version"]
    headings = re.findall(r"^## (\S+)", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert headings[0] == version and len(headings) == len(set(headings))
    assert "version" not in yaml.safe_load(read("CITATION.cff"))
    for path in [*test_house.FILES, ROOT / "Dockerfile"]:
        text = path.read_text(encoding="utf-8")
        assert "__version__ =" not in text and version not in SEMANTIC_VERSION.findall(text), path


def test_license_and_citation_agree_with_pyproject():
    citation = yaml.safe_load(read("CITATION.cff"))
    [author] = citation["authors"]
    assert read("LICENSE").startswith("MIT License\n") and author["name"] in read("LICENSE")
    assert project()["license"] == citation["license"] == "MIT"
    assert {"cff-version", "message", "title", "type"} <= citation.keys()
    files = [project()["readme"], *project()["license-files"]]
    assert all((ROOT / name).is_file() for name in files)


def test_ci_runs_the_makefile_on_supported_pythons():
    commands = [step["run"] for step in steps() if "run" in step]
    assert {"make check", "make test"} <= set(commands)
    assert {command.removeprefix("make ") for command in commands} <= targets()
    least = tuple(map(int, project()["requires-python"].removeprefix(">=").split(".")))
    versions = [*workflow()["jobs"]["test"]["strategy"]["matrix"]["python"]]
    inputs = [step["with"] for step in steps() if "with" in step]
    versions += [values["python-version"] for values in inputs if "python-version" in values]
    literal = [version for version in versions if "${{" not in str(version)]
    assert all(isinstance(version, str) for version in literal)  # YAML reads 3.10 as 3.1
    assert min(tuple(map(int, version.split("."))) for version in literal) == least
    assert all("timeout-minutes" in job for job in workflow()["jobs"].values())
    caches = {values["cache-dependency-path"] for values in inputs if "cache" in values}
    assert caches and all(any(ROOT.glob(pattern)) for pattern in caches)


def test_the_dockerfile_runs_the_makefile_and_copies_no_ignored_file():
    dockerfile = read("Dockerfile")
    commands = re.findall(r"\bmake (\w+)$", dockerfile, flags=re.MULTILINE)
    assert commands and set(commands) <= targets()
    assert "has not been built" in dockerfile.split("FROM")[0]
    ignored = [docker_pattern(line) for line in patterns(".gitignore")]
    assert patterns(".dockerignore") == ignored


def patterns(name: str) -> list[str]:
    return [line for line in read(name).splitlines() if line and not line.startswith("#")]


def docker_pattern(line: str) -> str:
    """Convert a .gitignore pattern to Docker's format, which is relative to the root."""
    negated, pattern = line.startswith("!"), line.removeprefix("!").removesuffix("/")
    anchored = "/" in pattern
    return "!" * negated + (pattern.removeprefix("/") if anchored else f"**/{pattern}")


def test_pre_commit_has_the_ruff_of_the_requirements():
    [repo] = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    [pinned] = re.findall(r"^ruff==(\S+)", read("requirements-dev.txt"), flags=re.MULTILINE)
    assert repo["rev"] == f"v{pinned}"
    assert [hook["id"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format"]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_parse_and_name_existing_commands(name):
    text = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    form = yaml.safe_load(text)
    assert {"name", "description", "body"} <= form.keys()
    identifiers = [field["id"] for field in form["body"]]
    assert len(identifiers) == len(set(identifiers))
    assert all(field["attributes"]["label"] for field in form["body"])
    for script in re.findall(r"python -m scripts\.(\w+)", text):
        assert (ROOT / f"scripts/{script}.py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_and_links_of_a_page_exist_and_its_lines_are_short(page):
    text = page.read_text(encoding="utf-8")
    files = {name for name in SOURCE_FILE.findall(text) if not PLACEHOLDER.search(name)}
    assert {name for name in files if not (ROOT / name).exists()} == set()
    assert missing_names(text) == []
    assert broken_links(page) == []
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("name", REPOSITORY_PAGES)
def test_paths_of_a_page_exist(name):
    assert missing_paths(read(name)) == []


def test_readme_is_short_and_begins_with_the_commands():
    lines = read("README.md").splitlines()
    assert len(lines) <= 130
    first_screen = "\n".join(lines[:40])
    assert all(f"make {name}" in first_screen for name in ("quickstart", "demo", "test"))
    named = set(re.findall(r"^make (\w+)", read("README.md"), flags=re.MULTILINE))
    assert named and named <= targets()


def test_readme_has_its_sections_and_no_figure_to_fill_in():
    text = read("README.md")
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == README_SECTIONS
    assert re.findall(r"\w*PLACEHOLDER\w*|\b(?:TIME|HW)_\w+", text) == []


def test_a_wrong_path_name_or_link_is_found(tmp_path):
    present = "`train.py`, `configs/evals/*.yaml`, `STORE/tokens/`, `models/`, `optim.lr`"
    lost = "`lost.py`, `configs/lost/*.yaml`, `lost/`, `data/lost.py:name`"
    assert missing_paths(f"{present}, {lost}") == [*code_spans(lost)[:3], "data/lost.py"]
    names = "`training/loop.py:train`, `training/loop.py:lost`, `training/schedulers.py:DECAYS`"
    assert missing_names(names) == ["training/loop.py:lost"]
    page = tmp_path / "page.md"
    links = "[a](page.md) [b](lost.md#part) [c](https://example.org/#d) [e](#the-end) [f](#no)"
    page.write_text(f"## The `end`!\n{links}\n", encoding="utf-8")
    assert broken_links(page) == ["lost.md#part", "#no"]


def test_every_document_is_in_the_index():
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", read("docs/README.md")))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_commands_of_contributing_exist():
    blocks = "".join(CODE_BLOCK.findall(read("CONTRIBUTING.md")))
    commands = set(re.findall(r"^make (\w+)", blocks, flags=re.MULTILINE))
    assert commands and commands <= targets()
    assert all((ROOT / name).is_file() for name in re.findall(r"\S+\.py\b", blocks))


def test_the_map_names_every_package_and_root_module():
    table = read("docs/architecture.md").split("## Map")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    spans = {span.rstrip("/") for cell in cells for span in code_spans(cell)}
    packages = {path.parent for path in test_house.FILES if path.name == "__init__.py"}
    modules = {path.name for path in ROOT.glob("*.py")}
    assert {str(path.relative_to(ROOT)) for path in packages} | modules <= spans
    assert {span for span in spans if not (ROOT / span).exists()} == set()


def test_the_import_table_is_the_one_that_is_enforced():
    table = read("docs/architecture.md").split("## Imports")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    written = {}
    for package, may_import in rows:
        allowed = set(code_spans(may_import))
        allowed |= test_house.LEAVES if "the leaves" in may_import else set()
        allowed |= set(test_house.PARTS) if "every package" in may_import else set()
        written[package.strip(" `")] = allowed
    assert written == test_house.MAY_IMPORT
    [leaves] = [line for line in read("docs/architecture.md").splitlines() if "| leaves:" in line]
    assert {span.removesuffix(".py") for span in code_spans(leaves)} == test_house.LEAVES


def test_editorconfig_parses_and_allows_no_longer_lines_than_ruff():
    parser = configparser.ConfigParser()
    parser.read_string(f"[top]\n{read('.editorconfig')}")
    assert parser["top"]["root"] == "true" and parser["Makefile"]["indent_style"] == "tab"
    allowed = tomllib.loads(read("pyproject.toml"))["tool"]["ruff"]["line-length"]
    assert int(parser["*"]["max_line_length"]) <= allowed

"""Read the chat templates of a model folder, in every form that transformers writes."""

from pathlib import Path
from typing import Any

from data.chat.template import TEMPLATE
from data.manifest import read_json

DEFAULT, WITH_TOOLS = "default", "tool_use"
NAMED = "additional_chat_templates"  # folder of NAME.jinja
OLD_FILE = "chat_template.json"  # a processor's {"chat_template": ...}


def template_files(folder: Path) -> list[Path]:
    """Return the template files of a folder."""
    single = [path for name in (TEMPLATE, OLD_FILE) if (path := folder / name).is_file()]
    return single + sorted((folder / NAMED).glob("*.jinja"))


def read_templates(folder: Path) -> dict[str, str]:
    """Return name -> template; {} for a base model. ValueError if a template is not text.

    As in transformers, files take priority over tokenizer_config.json.
    """
    files = {path.stem: path for path in template_files(folder) if path.parent.name == NAMED}
    if (folder / TEMPLATE).is_file():
        files[DEFAULT] = folder / TEMPLATE
    settings = {
        path: read_json(path).get("chat_template")
        for path in (folder / OLD_FILE, folder / "tokenizer_config.json")
    }
    templates: dict[str, str] = {}
    for name, path in files.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    if DEFAULT in templates:
        return templates
    for path, value in settings.items():
        templates = {**_named(value, path), **templates}
    return templates


def _named(value: Any, path: Path) -> dict[str, str]:
    """Return templates by name from a text, a list of {"name", "template"} or an object."""
    if not value:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, dict) or not all(
        isinstance(text, str) for pair in value.items() for text in pair
    ):
        raise ValueError(
            f"chat_template of {path} is neither text nor a list of named texts; fix or remove it"
        )
    return value


def choose(templates: dict[str, str], tools: Any = None) -> str | None:
    """Choose the template for a conversation as transformers does; None without templates.

    ValueError if several templates have no default.
    """
    if tools and WITH_TOOLS in templates:
        return templates[WITH_TOOLS]
    if DEFAULT in templates or len(templates) < 2:
        return next((templates[name] for name in (DEFAULT, *templates) if name in templates), None)
    raise ValueError(
        f"the model has chat templates named {', '.join(sorted(templates))}; "
        f"rename one of them to {DEFAULT!r}"
    )


def template_of(folder: Path) -> str | None:
    """Return a folder's chat template; None for a base model."""
    return choose(read_templates(folder))

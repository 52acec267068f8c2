"""Foreign chat templates: Jinja built from fragments, and arbitrary conversations."""

from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from data.chat import bounded_template
from data.chat.bounded_template import MAX_OUTPUT, BoundedTemplate
from data.chat.template import jinja_template
from fuzz.mutate import Change, change_json, json_changes
from fuzz.sandbox import fuzz

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {
        "role": "assistant",
        "content": "",
        "thought": "Easy.",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "content": "4", "name": "f"},
]
ATOMS = [
    *(
        "messages",
        "tools",
        "m",
        "m.content",
        "m['role']",
        "m.tool_calls",
        "bos_token",
        "loop",
        "loop.index",
        "ns.a",
        "none",
        "x",
    ),
    *(
        "'a'",
        "''",
        "0",
        "1",
        "-1",
        "3.5",
        "10**9",
        "[]",
        "{}",
        "[1, 'b']",
        "messages[0]",
        "messages[-1].content",
        "self",
        "cycler",
    ),
    *(
        "range(9)",
        "range(10**10)",
        "namespace(a=1)",
        "dict(a=1)",
        "strftime_now('%Y')",
        "raise_exception('no')",
        "lipsum()",
    ),
]
FILTERS = [
    *(
        "trim",
        "tojson",
        "length",
        "upper",
        "list",
        "string",
        "join(', ')",
        "first",
        "last",
        "replace('a', 'aa')",
        "safe",
        "int",
    ),
    *(
        "tojson(indent=1)",
        "map(attribute='content')",
        "selectattr('role')",
        "default('x')",
        "reverse",
        "items",
        "center(10**9)",
    ),
    *(
        "batch(3)",
        "indent(4)",
        "format(1)",
        "sort",
        "unique",
        "groupby('role')",
        "sum",
        "attr('__class__')",
        "e",
        "unknown",
    ),
]
METHODS = [
    *(
        ".split('a')",
        ".strip()",
        ".items()",
        ".startswith('a')",
        ".__class__",
        ".append(1)",
        "[0]",
        "[::-1]",
        "['a']",
    ),
    "",
]


@cache
def expressions() -> st.SearchStrategy[str]:
    atoms = st.sampled_from(ATOMS) | st.text("ab{}%'#\\\n", max_size=3)

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.tuples(inner, st.sampled_from(FILTERS)).map(" | ".join),
            st.tuples(
                inner,
                st.sampled_from(["+", "~", "*", "-", "==", "in", "and", "//", "**", "%"]),
                inner,
            ).map(" ".join),
            st.tuples(inner, st.sampled_from(METHODS)).map("".join),
            inner.map(lambda text: f"({text})"),
            inner.map(lambda text: f"({text} if m else 'b')"),
        )

    return st.recursive(atoms, larger, max_leaves=4)


@cache
def templates() -> st.SearchStrategy[str]:
    pieces = st.one_of(
        expressions().map(lambda text: "{{ " + text + " }}"), st.text("ab \n{%}-", max_size=4)
    )

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        value = expressions()
        return st.one_of(
            st.tuples(inner, inner).map("".join),
            inner.map(lambda text: "{% for m in messages %}" + text + "{% endfor %}"),
            st.tuples(value, inner).map(
                lambda t: "{% for m in " + t[0] + " %}" + t[1] + "{% endfor %}"
            ),
            st.tuples(value, inner, inner).map(
                lambda t: "{%- if " + t[0] + " -%}" + t[1] + "{% else %}" + t[2] + "{% endif %}"
            ),
            st.tuples(value, inner).map(
                lambda t: "{% set ns = namespace(a=" + t[0] + ") %}" + t[1]
            ),
            st.tuples(value, inner).map(lambda t: "{% set ns.a = " + t[0] + " %}" + t[1]),
            inner.map(
                lambda text: (
                    "{% macro f(x) %}"
                    + text
                    + "{{ f(x) if x is not defined }}{% endmacro %}{{ f(1) }}"
                )
            ),
            inner.map(lambda text: "{% generation %}" + text + "{% endgeneration %}"),
            inner.map(lambda text: "{% raw %}" + text + "{% endraw %}{% break %}"),
        )

    return st.recursive(pieces, larger, max_leaves=4)


@cache
def changed_own() -> st.SearchStrategy[str]:
    """Our template with a part removed, as in a damaged copy."""
    source = jinja_template()
    cuts = st.tuples(st.integers(0, len(source)), st.integers(0, 60))
    return cuts.map(lambda cut: source[: cut[0]] + source[cut[0] + cut[1] :])


def inputs() -> st.SearchStrategy[tuple[str, list[Change]]]:
    return st.tuples(templates() | templates() | changed_own(), json_changes(MESSAGES, most=2))


@fuzz(st.deferred(inputs), share=0.02, accepted=(0.2, 0.9))
def test_chat_templates(case: tuple[str, list[Change]], folder: Path) -> None:
    """A template renders to bounded text or is refused, within its time; its process ends with
    it.
    """
    source, changes = case
    bounded_template.MAX_SECONDS = 3
    messages: Any = change_json(MESSAGES, changes)
    if not (isinstance(messages, list) and all(isinstance(message, dict) for message in messages)):
        raise ValueError("messages that commands refuse before they render")
    template = BoundedTemplate(source)
    text = template.render(messages, bos_token="<s>")
    assert isinstance(text, str) and len(text) <= MAX_OUTPUT
    assert isinstance(template.render(messages, bos_token="<s>"), str)

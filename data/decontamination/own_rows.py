"""Evaluations that a user defines: the definition, and its rows as questions, answers and texts.

docs/own_evaluation.md has an example. evals/eval_own.py scores the rows, and test_sets.py turns
them into texts for decontamination.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from data.chat.rows import Row, input_files, read_rows
from data.corpus.documents import Skipped
from data.corpus.sources import HUB
from ranges import NonEmptyText, NonNegativeInt, PositiveInt, check_fields, one_of, shown
from yaml_file import read_yaml_file

COLUMNS = {  # kind -> its columns; `id` and `subject` are optional
    "multiple_choice": ("question", "choices", "answer", "id", "subject"),
    "question_answer": ("question", "answer", "id", "subject"),
    "text": ("text", "id", "subject"),
}
METRICS = {  # kind -> its metrics, in the order of the results
    "multiple_choice": ("acc", "acc_norm"),
    "question_answer": ("exact_match", "number_match", "contains"),
    "text": ("bits_per_byte", "perplexity", "loss"),
}
DEFAULT_METRICS = {**METRICS, "question_answer": ("exact_match",)}
ANSWERS = ("index", "position", "letter", "text")
NO_EFFECT = {  # kind -> settings without an effect
    "multiple_choice": ("max_tokens", "stop", "chat"),
    "question_answer": ("answer_is",),
    "text": ("answer_is", "max_tokens", "stop", "chat", "shots", "shots_path", "template"),
}
TEMPLATE = "Question: {question}\nAnswer:"
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class OwnEval:
    """The definition of an evaluation: one YAML file. Paths are relative to the working folder."""

    name: NonEmptyText  # in results, gates and reports
    path: NonEmptyText  # .jsonl, .json, .csv, .tsv, .parquet, a folder, or hf://owner/name
    kind: Annotated[str, one_of(*COLUMNS)]
    # question, choices, answer, text, id or subject -> column of the rows (default: equal names).
    # a.b is key b of the object in column a; choices may be a list of columns.
    columns: dict[str, str | tuple[str, ...] | None] = field(default_factory=dict)
    metric: str | tuple[str, ...] | None = None  # of METRICS; the first is the main metric
    # How the answer names a choice: index (from 0), position (from 1), letter or text.
    # Default: a number is an index; text is an index, a letter or a choice, if unambiguous.
    answer_is: Annotated[str, one_of(*ANSWERS)] | None = None
    shots: NonNegativeInt = 0  # solved examples before each question
    shots_path: str | None = None  # rows of the solved examples; default: the other rows of `path`
    limit: PositiveInt | None = None  # evaluate only the first rows
    template: str | None = None  # prompt with {question} and other columns; the answer follows
    max_tokens: PositiveInt | None = None  # maximum tokens of a generated answer; default: 64
    stop: tuple[str, ...] | None = None  # texts that end an answer; default: a newline
    chat: bool = False  # prompt in the model's chat template
    split: str = "train"  # of a hub data set
    config: str | None = None  # of a hub data set with several

    def __post_init__(self) -> None:
        check_fields(self)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(
                f"name={shown(self.name)} must consist of letters, digits, - and _, as gates "
                "write NAME.METRIC"
            )
        for role in self.columns:
            if role not in COLUMNS[self.kind]:
                raise ValueError(
                    f"columns.{role}: a {self.kind} evaluation has the columns "
                    f"{', '.join(COLUMNS[self.kind])}; remove or rename it"
                )
        defaults = {setting.name: setting.default for setting in fields(self)}
        for setting in NO_EFFECT[self.kind]:
            if getattr(self, setting) != defaults[setting]:
                raise ValueError(f"{setting} has no effect in a {self.kind} evaluation; remove it")
        for metric in self.metrics:
            if metric not in METRICS[self.kind]:
                raise ValueError(
                    f"metric={shown(metric)} is not one of {', '.join(METRICS[self.kind])}, the "
                    f"metrics of a {self.kind} evaluation"
                )
        template = self.template
        if template is not None and not PLACEHOLDER.search(template):
            raise ValueError(f"template={shown(template)} has no placeholder such as {{question}}")
        if template is not None and template != template.rstrip():
            raise ValueError(
                f"template={shown(template)} ends with white space; remove it, since a space is "
                "added before the answer"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        if self.metric is None:
            return DEFAULT_METRICS[self.kind]
        return (self.metric,) if isinstance(self.metric, str) else tuple(self.metric)

    def column(self, role: str) -> str | tuple[str, ...]:
        """Return the column or the columns of a role."""
        column = self.columns.get(role) or role
        return column if isinstance(column, str) else tuple(column)


@dataclass(frozen=True)
class OwnRow:
    """A row of an evaluation. Rows with equal values are equal, as in lm-eval's few-shot draw."""

    values: dict[str, Any]  # the row as read
    where: str = field(compare=False)  # file:line
    id: str = field(compare=False)
    subject: str = field(compare=False, default="")
    question: str = field(compare=False, default="")
    choices: tuple[str, ...] = field(compare=False, default=())
    gold: int = field(compare=False, default=-1)  # index of the right choice
    answers: tuple[str, ...] = field(compare=False, default=())  # accepted, or the right choice
    text: str = field(compare=False, default="")

    def render(self, template: str) -> str:
        """Fill in a template. ValueError if the row lacks one of its columns."""

        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name == "question":
                return self.question
            if not isinstance(content := self.values.get(name), str | int | float):
                problem = f"{shown(content)} as {name}" if name in self.values else f"no {name!r}"
                raise ValueError(
                    f"{self.where} has {problem}, but the template needs text for {match[0]}; fix "
                    "the row or the template"
                )
            return str(content)

        return PLACEHOLDER.sub(value, template)

    def variants(self) -> tuple[str, ...]:
        """Return the texts whose presence in training data makes the row contaminated."""
        if self.text:
            return (self.text,)
        answered = (self.question, f"{self.question}\n{self.answers[0]}")
        return (*answered, "\n".join([self.question, *self.choices])) if self.choices else answered


def read_definition(path: Path) -> OwnEval:
    """Read a definition for decontamination; ValueError if it is invalid.

    evals/eval_own.py:definition gives better messages and supports `extends`.
    """
    values = read_yaml_file(path)
    try:
        return OwnEval(**values)
    except TypeError as error:
        raise ValueError(
            f"{path} is not the definition of an evaluation ({error}); see docs/own_evaluation.md"
        ) from error


def files_of(definition: OwnEval, path: str | None = None) -> list[Path]:
    """Return the files of the rows and of the solved examples; [] for a hub data set.

    path: default: definition.path.
    """
    paths = [path or definition.path, *([definition.shots_path] if definition.shots_path else [])]
    return [file for path in paths for file in input_files(path).values()]


def read_own_rows(definition: OwnEval, path: str | None = None) -> list[OwnRow]:
    """Read and check all rows; ValueError names a bad row's file:line.

    path: default: definition.path.
    """
    path = path or definition.path
    rows = (
        read_rows(path, definition.split, definition.config)
        if path.startswith(HUB)
        else read_rows(path)
    )
    checked = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, Skipped):
            raise ValueError(f"{row.where}: {row.reason}; fix or remove the line")
        checked.append(_checked(definition, row, number))
    if not checked:
        raise ValueError(f"{path} has no rows; give a file with at least one")
    return checked


class _Reader:
    """Typed access to a row by role; ValueError names file and line."""

    def __init__(self, definition: OwnEval, row: Row):
        self.definition, self.row = definition, row

    def fail(self, problem: str) -> ValueError:
        return ValueError(f"{self.row.where} {problem}; fix the row, or `columns` in the YAML file")

    def value(self, role: str) -> Any:
        """Return the content of a role's column, or a list for several columns."""
        column = self.definition.column(role)
        if isinstance(column, tuple):
            return [self._at(name) for name in column]
        return self._at(column)

    def optional(self, role: str, default: str) -> str:
        """Return the content as text; the default if the definition does not name the column."""
        has_column = role in self.definition.columns or (role == "id" and "id" in self.row.value)
        return str(self.value(role)) if has_column else default

    def _at(self, column: str) -> Any:
        if not _has(self.row.value, column):
            present = ", ".join(map(str, self.row.value)) or "nothing"
            raise self.fail(f"has no column {column!r}, only {present}")
        return _at(self.row.value, column)

    def text(self, role: str) -> str:
        value = self.value(role)
        if not isinstance(value, str) or not value.strip():
            raise self.fail(f"has {shown(value)} as {role}, which must be a text")
        return value

    def choices(self) -> tuple[str, ...]:
        value = self.value("choices")
        texts = isinstance(value, list) and all(isinstance(c, str) and c.strip() for c in value)
        if not texts or len(value) < 2:
            raise self.fail(f"has {shown(value)} as choices, which must be two or more texts")
        if len(set(value)) < len(value):
            raise self.fail(f"has equal choices: {shown(value)}")
        return tuple(value)

    def gold(self, choices: tuple[str, ...]) -> int:
        """Return the index of the right choice; ValueError if the answer names none or several."""
        value, count = self.value("answer"), len(choices)
        text = str(value).strip()
        number = int(text) if text.isdecimal() and len(text) < 4 else -1
        letter = ord(text.upper()) - ord("A") if len(text) == 1 and text.isascii() else -1
        readings = {
            "index": number,
            "position": number - 1,
            "letter": letter,
            "text": choices.index(value) if value in choices else -1,
        }
        if self.definition.answer_is:
            ways = [self.definition.answer_is]
        elif isinstance(value, int):
            ways = ["index"]
        else:
            ways = ["index", "letter", "text"]
        valid = isinstance(value, (int, str)) and not isinstance(value, bool)
        choice = {way: readings[way] for way in ways if valid and 0 <= readings[way] < count}
        if not choice:
            raise self.fail(
                f"has {shown(value)} as answer, which is not the {' or '.join(ways)} of one of "
                f"its {count} choices (answer_is sets how it is read)"
            )
        if len(set(choice.values())) > 1:
            raise self.fail(
                f"has {shown(value)} as answer, which is the {' and the '.join(choice)} of "
                "different choices; set answer_is"
            )
        return next(iter(choice.values()))

    def answers(self) -> tuple[str, ...]:
        value = self.value("answer")
        values = value if isinstance(value, list) else [value]
        valid = [
            isinstance(answer, (str, int, float)) and not isinstance(answer, bool)
            for answer in values
        ]
        if not values or not all(valid) or not all(str(answer).strip() for answer in values):
            raise self.fail(
                f"has {shown(value)} as answer, which must be a text, a number or a list of them"
            )
        return tuple(str(answer).strip() for answer in values)


def _checked(definition: OwnEval, row: Row, number: int) -> OwnRow:
    reader = _Reader(definition, row)
    common: dict[str, Any] = {
        "values": row.value,
        "where": row.where,
        "id": reader.optional("id", str(number)),
        "subject": reader.optional("subject", ""),
    }
    if definition.kind == "text":
        return OwnRow(**common, text=reader.text("text"))
    question = reader.text("question")
    if definition.kind == "question_answer":
        return OwnRow(**common, question=question, answers=reader.answers())
    choices = reader.choices()
    gold = reader.gold(choices)
    answers = (choices[gold],)
    return OwnRow(**common, question=question, choices=choices, gold=gold, answers=answers)


def _has(row: Any, column: str) -> bool:
    if not isinstance(row, dict):
        return False
    first, dot, rest = column.partition(".")
    return column in row or bool(dot and _has(row.get(first), rest))


def _at(row: dict[str, Any], column: str) -> Any:
    """Return the content of a column; a.b is key b of the object in column a."""
    if column in row:
        return row[column]
    first, _, rest = column.partition(".")
    return _at(row[first], rest)

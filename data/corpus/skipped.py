"""Report the rows and files that a reader skipped; refuse a source with too many of them."""

import sys
from collections.abc import Mapping
from typing import Any

from data.corpus.documents import (
    BINARY,
    CONVERSATION,
    DAMAGED,
    ENCODING,
    NO_COLUMN,
    NO_TEXT,
    NO_TEXT_COLUMN,
    NOT_JSON,
    NOT_OBJECT,
    UNREADABLE,
    UNREADABLE_FILE,
    UNREADABLE_ROWS,
)
from data.corpus.readers import Reader
from data.corpus.tables import NOT_ROWS

MAX_EXAMPLES = 5  # skipped rows that are listed, per reason
MAX_UNDECODABLE = 0.5  # maximum share of text files in an unsupported encoding: our judgement
COLUMN = "name the column of the text with --text_column"
PLAIN = "correct the rows, or rename a file of plain text to .txt (.txt.gz, .txt.zst)"
COPY = "restore them from a copy"
ADVICE = {  # reason -> what to do
    **dict.fromkeys((NO_COLUMN, NO_TEXT_COLUMN), COLUMN),
    CONVERSATION: "give them to train_sft.py (docs/sft.md)",
    NO_TEXT: "check the path; for a table, the text column (--text_column)",
    **dict.fromkeys((NOT_JSON, NOT_ROWS), PLAIN),
    NOT_OBJECT: 'write each row as {"text": "..."}',
    BINARY: "convert them to text",
    ENCODING: "convert them with iconv -t UTF-8",
    **dict.fromkeys((DAMAGED, UNREADABLE_FILE, UNREADABLE_ROWS), COPY),
}


def advice(skipped: Mapping[str, int], default: str) -> str:
    """Say what to do about the most frequent reason that has an advice."""
    known = [reason for reason in skipped if reason in ADVICE]
    return ADVICE[max(known, key=skipped.__getitem__)] if known else default


def report_skipped(name: str, reader: Reader, state: dict[str, Any]) -> None:
    """Print the chosen columns and the skipped rows of a source to standard error."""
    for column, where in reader.notes.items():
        print(
            f"{name}: read the column {column!r} as text, first in {where}; --text_column names "
            "another",
            file=sys.stderr,
        )
    for reason, count in state["skipped"].items():
        examples = state["skipped_examples"][reason]
        if examples:
            more = ", ..." if count > MAX_EXAMPLES else ""
            print(
                f"{name}: skipped {count:,} ({reason}): {', '.join(examples)}{more}",
                file=sys.stderr,
            )
    if state["repaired"]:
        print(
            f"{name}: replaced lone surrogates by U+FFFD in {state['repaired']:,} documents",
            file=sys.stderr,
        )


def check_read(reader: Reader, state: dict[str, Any], max_bad: float) -> None:
    """ValueError if a source has no document or too many unreadable rows."""

    def listing(skipped: dict[str, int]) -> str:
        return ", ".join(f"{count:,} x {reason}" for reason, count in skipped.items())

    skipped, examples = state["skipped"], state["skipped_examples"]
    if not state["documents"]:
        reasons = listing(skipped) or "it is empty"
        first = next((f"; the first is {rows[0]}" for rows in examples.values() if rows), "")
        raise ValueError(
            f"{reader.origin} has no readable document ({reasons}{first}); "
            f"{advice(skipped, 'check the path')}"
        )
    undecodable, texts = skipped.get(ENCODING, 0), state["documents"] + skipped.get(ENCODING, 0)
    if undecodable > MAX_UNDECODABLE * texts:
        raise ValueError(
            f"{undecodable:,} of {texts:,} texts of {reader.origin} are neither UTF-8 nor UTF-16 "
            f"with a byte-order mark (the first is {examples[ENCODING][0]}); convert them with "
            "iconv -t UTF-8"
        )
    unreadable = {reason: count for reason, count in skipped.items() if reason in UNREADABLE}
    bad = sum(unreadable.values())
    rows = state["documents"] + bad + skipped.get(NO_TEXT, 0)
    if bad > max_bad * rows:
        first = next(examples[reason][0] for reason in unreadable)
        raise ValueError(
            f"{bad / rows:.1%} of the {rows:,} rows of {reader.origin} cannot be read "
            f"({listing(unreadable)}; the first is {first}); {advice(unreadable, 'correct them')}, "
            f"or raise --max_bad (now {max_bad:g})"
        )

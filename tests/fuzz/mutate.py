"""Changes of valid inputs as plain data: strategies draw them, functions apply them.

A change is a tuple of its name and arguments; the repr of a failure is a valid example.
"""

import copy
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from hypothesis import strategies as st

Change = tuple[Any, ...]
LONG = "a number of 5,001 digits"  # Python cannot parse or print it as an int
EXTREMES: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 255, 65_536, 2**31, 2**32, 2**63, -(2**63), 2**64, 10**30, LONG),
    *(0.0, -0.0, 0.5, 1.5, -1e-9, 1e-300, 1e15, 1e308, float("inf"), float("-inf"), float("nan")),
]
LEAVES: list[Any] = [
    *(None, True, False),
    *EXTREMES,
    *(
        "",
        "a",
        "0",
        "1e3",
        "null",
        "\x00",
        "\ud800",
        "\u2028",
        "é" * 40,
        "../x",
        "/dev/zero",
        "9" * 5000,
        "a\nb",
        "{",
        "%s",
    ),
    *([], {}, [None], [[]], {"": 0}, [0] * 40, ["a", 1], {"a": {"b": []}}),
]


WRAPS: dict[str, Callable[[Any], Any]] = {
    "list": lambda value: [value],
    "dict": lambda value: {"a": value},
    "text": str,
    "json": lambda value: dump(value),
}


def nested(depth: int) -> Any:
    """Return a deeply nested list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


LEAVES.append(nested(90))
NUMBERS = [
    struct.pack(f"<{letter}", n)
    for letter in "IQ"
    for n in (0, 1, 2, 7, 9, 255, 1 << 16, (1 << 31) - 1, 1 << 31)
]
NUMBERS += [
    b"[" * 3000,
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x00" * 16,
    struct.pack("<f", float("nan")),
    struct.pack("<f", float("inf")),
    b"\x80",
]


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in JSON; of long lists only the first and last few."""
    items: list[Any] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    items = items if len(items) < 60 else [*items[:20], *items[-20:]]
    return [
        *([path] if path else []),
        *(p for key, part in items for p in paths_of(part, (*path, key))),
    ]


def json_changes(
    base: Any, words: Sequence[str] = (), most: int = 3
) -> st.SearchStrategy[list[Change]]:
    """Up to `most` changes of a JSON value. words: other keys and strings of the format."""
    places = st.sampled_from(paths_of(base))
    texts = st.sampled_from(
        [*words, *(p[-1] for p in paths_of(base) if isinstance(p[-1], str)), "", "x", "\ud800"]
    )
    leaves = st.sampled_from(LEAVES) | texts | st.integers(-4, 9)
    numbered = [path for path in paths_of(base) if type(_at(base, path)) in (int, float)]
    number = (
        st.tuples(st.just("put"), st.sampled_from(numbered), st.sampled_from(EXTREMES))
        if numbered
        else st.nothing()
    )
    change = st.one_of(
        number,
        number,
        number,
        st.tuples(st.just("put"), places, leaves),
        st.tuples(st.just("drop"), places),
        st.tuples(st.just("copy"), places, places),
        st.tuples(st.just("rename"), places, texts),
        st.tuples(st.just("add"), places, texts, leaves),
        st.tuples(st.just("twice"), places),
        st.tuples(st.just("wrap"), places, st.sampled_from(["list", "dict", "text", "json"])),
    )
    return st.lists(change, max_size=most)


def _at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def change_json(base: Any, changes: Sequence[Change]) -> Any:
    """Return the changed value; skip changes whose path no longer exists."""
    root = {"": copy.deepcopy(base)}
    for name, path, *more in changes:
        try:
            holder, key = _at(root[""], path[:-1]), path[-1]
            old = holder[key]
            if name == "put":
                holder[key] = copy.deepcopy(more[0])
            elif name == "drop":
                del holder[key]
            elif name == "copy":
                holder[key] = copy.deepcopy(_at(root[""], more[0]))
            elif name == "rename":
                holder[more[0]] = holder.pop(key)
            elif name == "add":
                (old if isinstance(old, dict) else holder)[more[0]] = copy.deepcopy(more[1])
            elif name == "twice":
                holder.insert(key, copy.deepcopy(old))
            elif name == "wrap":
                wraps: dict[str, Callable[[Any], Any]] = {
                    "list": lambda v: [v],
                    "dict": lambda v: {"a": v},
                    "text": str,
                    "json": dump,
                }
                holder[key] = wraps[more[0]](old)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            continue
    return root[""]


def dump(value: Any) -> str:
    """Return JSON text; LONG becomes a number of 5,001 digits."""
    return json.dumps(value).replace(json.dumps(LONG), "1" + "0" * 5000)


def byte_changes(
    size: int, most: int = 3, special: Sequence[int] = ()
) -> st.SearchStrategy[list[Change]]:
    """Up to `most` changes of a file of so many bytes. special: places that matter more than
    others.
    """
    places = st.integers(0, max(size - 1, 0)) | st.integers(0, max(min(size - 1, 64), 0))
    if special:
        places |= st.sampled_from(list(special))
    change = st.one_of(
        st.tuples(st.just("flip"), places, st.integers(0, 7)),
        st.tuples(
            st.just("set"), places, st.binary(min_size=1, max_size=4) | st.sampled_from(NUMBERS)
        ),
        st.tuples(st.just("cut"), places),
        st.tuples(st.just("remove"), places, st.integers(1, 40)),
        st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("repeat"), places, st.integers(1, 64)),
        st.tuples(st.just("extend"), st.binary(min_size=1, max_size=64)),
    )
    return st.lists(change, min_size=1, max_size=most)


def change_bytes(data: bytes, changes: Sequence[Change]) -> bytes:
    """Return the changed bytes."""
    for name, *more in changes:
        position = more[0] if isinstance(more[0], int) else 0
        if name == "flip" and position < len(data):
            data = data[:position] + bytes([data[position] ^ 1 << more[1]]) + data[position + 1 :]
        elif name == "set":
            data = data[:position] + more[1] + data[position + len(more[1]) :]
        elif name == "cut":
            data = data[:position]
        elif name == "remove":
            data = data[:position] + data[position + more[1] :]
        elif name == "insert":
            data = data[:position] + more[1] + data[position:]
        elif name == "repeat":
            data = data[: position + more[1]] + data[position:]
        elif name == "extend":
            data += more[0]
    return data


def folder_changes(
    files: Mapping[str, bytes],
    most: int = 2,
    words: Sequence[str] = (),
    also: st.SearchStrategy[Change] | None = None,
) -> st.SearchStrategy[list[Change]]:
    """Up to `most` files of a folder changed. also: further changes that the caller applies."""
    names = st.sampled_from(sorted(files))

    @cache
    def of_bytes(name: str) -> st.SearchStrategy[Change]:
        return st.tuples(st.just("bytes"), st.just(name), byte_changes(len(files[name])))

    @cache
    def of_json(name: str) -> st.SearchStrategy[Change]:
        return st.tuples(
            st.just("json"), st.just(name), json_changes(json.loads(files[name]), words)
        )

    change = st.one_of(
        names.flatmap(of_bytes),
        st.sampled_from(sorted(name for name in files if name.endswith(".json"))).flatmap(of_json),
        st.tuples(st.just("swap"), names, names),
        st.tuples(st.just("delete"), names),
        st.tuples(st.just("empty"), names),
        *([also] if also is not None else []),
    )
    return st.lists(change, max_size=most)


def change_folder(files: Mapping[str, bytes], changes: Sequence[Change]) -> dict[str, bytes]:
    """Return the changed files."""
    changed = dict(files)
    for kind, name, *more in changes:
        if name not in changed:
            continue
        if kind == "bytes":
            changed[name] = change_bytes(changed[name], more[0])
        elif kind == "json":
            try:
                changed[name] = dump(change_json(json.loads(changed[name]), more[0])).encode()
            except ValueError:
                continue
        elif kind == "swap" and more[0] in changed:
            changed[name], changed[more[0]] = changed[more[0]], changed[name]
        elif kind == "delete":
            del changed[name]
        elif kind == "empty":
            changed[name] = b""
    return changed

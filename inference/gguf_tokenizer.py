"""Convert a folder's tokenizer and chat templates to GGUF keys, and back to a folder.

llama.cpp selects a built-in pre-tokenizer by name; other pre-tokenizers raise ValueError. Thought
and tool markers are USER_DEFINED tokens, because llama.cpp omits CONTROL tokens from its output.
"""

import functools
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from data.chat.folder_templates import DEFAULT, NAMED, choose, read_templates
from data.chat.template import IM_END, SHOWN, TEMPLATE
from data.chat.trained_chat import KEY, to_text
from data.manifest import read_json
from data.tokenizers.bpe import BOS, QWEN2_SPLIT, listed_ids, load_tokenizer, special_text
from inference.gguf_file import check_gguf

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
TRAINED = "nanollama.chat"
GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


class Vocabulary(NamedTuple):
    """Values of the tokenizer.* keys."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    ids: dict[str, int]  # of bos, eos, eot and pad, where defined
    add_bos: bool
    template: str | None
    named: dict[str, str]  # additional templates, by name
    trained: str | None  # settings of chat training (trained_chat.py), as JSON

    def put(self, writer: Any) -> None:
        """Add the keys to a gguf.GGUFWriter."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        add = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id}
        add |= {"eot": writer.add_eot_token_id, "pad": writer.add_pad_token_id}
        for name, index in self.ids.items():
            add[name](index)
        writer.add_add_bos_token(self.add_bos)
        if self.template is not None:
            writer.add_chat_template(self.template)
        for name, template in sorted(self.named.items()):
            writer.add_string(f"tokenizer.chat_template.{name}", template)
        if self.named:
            writer.add_array("tokenizer.chat_templates", sorted(self.named))
        if self.trained:
            writer.add_string(TRAINED, self.trained)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Read a folder's vocabulary, padded to `size`; ValueError if llama.cpp cannot reproduce it."""
    tokenizer = load_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    kind = model.get("type", "BPE")
    unsupported = {
        f"it is a {kind} model, not BPE": kind != "BPE",
        "it has a normalizer": content.get("normalizer") is not None,
        "it uses byte_fallback": bool(model.get("byte_fallback")),
        "it uses ignore_merges": bool(model.get("ignore_merges")),
    }
    for reason, is_set in unsupported.items():
        if is_set:
            raise ValueError(f"llama.cpp cannot reproduce the tokenizer of {folder}: {reason}")
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    names = {index: token for token, index in model["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    if max(names) >= size:
        raise ValueError(
            f"the tokenizer of {folder} has {max(names) + 1} tokens, more than the model's {size}; "
            "use the model's own tokenizer"
        )
    types = [
        UNUSED if i not in names else _type(added[i]) if i in added else NORMAL for i in range(size)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ids = _special_ids(folder, tokenizer)
    templates = {
        name: GENERATION.sub(r"{{\1''\2}}", text) for name, text in read_templates(folder).items()
    }
    template = choose(templates)
    named = {name: text for name, text in templates.items() if name != DEFAULT and text != template}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(size)]
    pre = split_name(content.get("pre_tokenizer"), folder)
    return Vocabulary(
        tokens,
        types,
        merges,
        pre,
        ids,
        _adds_bos(tokenizer, ids, folder),
        template,
        named,
        to_text(folder),
    )


def _type(token: dict[str, Any]) -> int:
    return CONTROL if token["special"] and token["content"] not in SHOWN else USER_DEFINED


def split_name(pre: dict[str, Any] | None, folder: Path) -> str:
    """Return llama.cpp's name of a pre-tokenizer from tokenizer.json."""
    steps = pre.get("pretokenizers", [pre]) if pre else []
    kinds = [step["type"] for step in steps]
    plain = bool(steps) and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space")
    gpt2_regex = plain and steps[-1].get("use_regex", True)  # built into ByteLevel
    if gpt2_regex and kinds == ["ByteLevel"]:
        return "gpt-2"
    if gpt2_regex and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if plain and not gpt2_regex and kinds == ["Split", "ByteLevel"]:
        split = steps[0]
        if (
            split["pattern"] == {"Regex": QWEN2_SPLIT}
            and split["behavior"] == "Isolated"
            and not split["invert"]
        ):
            return "qwen2"
    raise ValueError(
        f"the tokenizer of {folder} uses no pre-tokenizer that llama.cpp has; "
        "train one with python -m scripts.train_tokenizer"
    )


def _special_ids(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Read the ids of bos, eos and pad from tokenizer_config.json, else config.json.

    eot, which ends replies, is <|im_end|> if the tokenizer has it, else eos.
    """
    settings, config = (
        read_json(folder / name) for name in ("tokenizer_config.json", "config.json")
    )
    ids = {}
    for name in ("bos", "eos", "pad"):
        token = special_text(settings, f"{name}_token")
        index = (
            tokenizer.token_to_id(token)
            if token
            else next(iter(listed_ids(config, f"{name}_token_id")), None)
        )
        if index is not None:
            ids[name] = index
    if "eos" not in ids:
        raise ValueError(
            f"{folder} has no eos token, so replies would not end; "
            "set eos_token in its tokenizer_config.json"
        )
    end = tokenizer.token_to_id(IM_END)
    return {**ids, "eot": ids["eos"] if end is None else end}


def _adds_bos(tokenizer: Tokenizer, ids: dict[str, int], folder: Path) -> bool:
    """Return True if the tokenizer adds bos; ValueError if it adds other tokens."""
    with_special = tokenizer.encode("a", add_special_tokens=True).ids
    without = tokenizer.encode("a", add_special_tokens=False).ids
    if with_special == without:
        return False
    if with_special != [ids.get("bos"), *without]:
        raise ValueError(
            f"the tokenizer of {folder} adds other tokens than bos, which llama.cpp does not"
        )
    return True


def build_tokenizer(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str
) -> Tokenizer:
    """Rebuild a tokenizer from GGUF keys; ValueError for an unknown pre-tokenizer."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    qwen2 = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    digits = pre_tokenizers.Digits(individual_digits=True)
    known = {
        "qwen2": pre_tokenizers.Sequence([qwen2, bytes_only]),
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([digits, gpt2]),
    }
    if pre not in known:
        raise ValueError(f"unknown pre-tokenizer {pre!r}; supported are {', '.join(known)}")
    vocab = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != UNUSED
    }
    pairs = [(merge.split(" ", 1)[0], merge.split(" ", 1)[1]) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = known[pre]
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            added = AddedToken(token, special=kind == CONTROL, normalized=False)
            tokenizer.add_tokens([added])
    return tokenizer


def open_gguf(path: Path) -> Any:
    """Open a gguf.GGUFReader; ValueError if the file is missing, damaged or not GGUF."""
    import gguf

    check_gguf(path)
    return gguf.GGUFReader(path)


def field(reader: Any, name: str) -> Any:
    """Return the value of a key; None if it is missing."""
    entry = reader.get_field(name)
    return None if entry is None else entry.contents()


def file_templates(reader: Any) -> dict[str, str]:
    """Read a GGUF file's chat templates by name. Names must be words, as others may be paths."""
    names = [
        name
        for name in field(reader, "tokenizer.chat_templates") or []
        if re.fullmatch(r"\w+", str(name), re.ASCII)
    ]
    keys = {
        DEFAULT: "tokenizer.chat_template",
        **{name: f"tokenizer.chat_template.{name}" for name in names},
    }
    templates = {name: field(reader, key) for name, key in keys.items()}
    return {name: template for name, template in templates.items() if isinstance(template, str)}


def json_of(text: Any) -> Any:
    """Parse JSON; return the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


def tokenizer_folder(checkpoint: Path) -> Path:
    """Return a folder with a checkpoint's tokenizer, templates and config.

    A checkpoint folder is returned unchanged; a .gguf file is unpacked to a temporary folder.
    ValueError if the file is missing or its pre-tokenizer is unknown.
    """
    if checkpoint.suffix != ".gguf":
        return checkpoint
    path = checkpoint.resolve()
    return Path(_unpacked(path, path.stat().st_mtime_ns if path.is_file() else 0).name)


@functools.cache
def _unpacked(path: Path, changed: int) -> "tempfile.TemporaryDirectory[str]":
    """Unpack one version of a file; the folder is removed when the process ends."""
    reader = open_gguf(path)
    tokens, types, merges, pre = (
        field(reader, f"tokenizer.ggml.{name}")
        for name in ("tokens", "token_type", "merges", "pre")
    )
    if field(reader, "tokenizer.ggml.model") != "gpt2" or merges is None:
        raise ValueError(f"{path} has no byte-level BPE tokenizer; use scripts/export_gguf.py")
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "eot": "eot"}
    ids = {name: field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    try:
        tokenizer = build_tokenizer(
            tokens, [NORMAL] * len(tokens) if types is None else types, merges, pre
        )
        if field(reader, "tokenizer.ggml.add_bos_token") and ids["bos"] is not None:
            bos = tokens[ids["bos"]]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], special_tokens=[(bos, ids["bos"])]
            )
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(f"{path}: {error}") from error
    folder = tempfile.TemporaryDirectory(prefix="gguf-tokenizer-")
    root = Path(folder.name)
    tokenizer.save(str(root / "tokenizer.json"))
    for name, template in file_templates(reader).items():
        file = root / TEMPLATE if name == DEFAULT else root / NAMED / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(template, encoding="utf-8")
    special = {
        f"{name}_token": tokens[ids[name]]
        for name in ("bos", "eos", "pad")
        if ids[name] is not None
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    config = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    config["max_position_embeddings"] = field(
        reader, f"{field(reader, 'general.architecture')}.context_length"
    )
    if text := field(reader, TRAINED):
        config[KEY] = json_of(text)
    # llama.cpp ends text at these tokens.
    stops = sorted({ids["eos"], ids["eot"], tokenizer.token_to_id(BOS)} - {None})
    config_files = {
        "tokenizer_config.json": settings,
        "config.json": config,
        "generation_config.json": {"eos_token_id": stops},
    }
    for name, content in config_files.items():
        (root / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder

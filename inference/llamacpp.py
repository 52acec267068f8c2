"""Call llama.cpp through ctypes: load a GGUF file, feed tokens, read logits.

The library comes from the package xllamacpp (prebuilt) or llama-cpp-python. Only the first fields
of its structs are declared; structs are passed in buffers larger than any version's, which the
calling conventions of x86-64 and AArch64 allow.
"""

import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from inference.gguf_file import check_gguf
from machine import cpus

BATCH = 512  # tokens per llama_decode call
MAX_ERROR_LINES = 4  # lines of llama.cpp's errors that a message quotes
PROBE_CONTEXT = 64  # tokens
PROBE_SECONDS = 10  # time limit of a probe: this, plus the file size over PROBE_RATE
PROBE_RATE = 50e6  # bytes/s
_errors: list[str] = []


class _Params(ctypes.Structure):
    """llama_model_params or llama_context_params (first fields: n_ctx, n_batch, n_ubatch)."""

    _fields_ = (("numbers", c_uint32 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),  # null positions and sequence ids continue sequence 0
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
    )


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_validate_row_data": (c_bool, [c_int32, c_void_p, c_size_t]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "llama_backend_init": (None, []),
    "llama_context_default_params": (_Params, []),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_detokenize": (
        c_int32,
        [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool],
    ),
    "llama_free": (None, [c_void_p]),
    "llama_get_logits": (POINTER(ctypes.c_float), [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, _Params]),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_model_default_params": (_Params, []),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _Params]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_tokenize": (
        c_int32,
        [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
    ),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
}


@ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
def _log(level: int, text: bytes, _: Any) -> None:
    if level == 4 and text:  # GGML_LOG_LEVEL_ERROR
        _errors.append(text.decode(errors="replace").strip())
        del _errors[:-MAX_ERROR_LINES]


def find_library() -> tuple[str, Path] | None:
    """Find an installed llama.cpp: package name and library path, or None."""
    for package, pattern in (("xllamacpp", "xllamacpp*.so"), ("llama_cpp", "lib/libllama.*")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).glob(pattern)):
                return package, path
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """Load llama.cpp; ValueError if it is not installed or too old."""
    installed = find_library()
    if installed is None:
        raise ValueError(
            "llama.cpp is not installed; "
            "pip install xllamacpp (a prebuilt wheel) or llama-cpp-python"
        )
    package, path = installed
    # llama-cpp-python has ggml in separate libraries.
    for ggml in sorted(path.parent.glob("libggml-base.*")):
        ctypes.CDLL(str(ggml), mode=ctypes.RTLD_GLOBAL)
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise ValueError(
            f"the llama.cpp of {package} does not load: {error}; "
            "pip install --force-reinstall xllamacpp"
        ) from None
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise ValueError(
                f"{package} does not have llama.cpp's {name}; pip install xllamacpp"
            ) from None
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(ctypes.cast(_log, c_void_p), None)
    lib.llama_backend_init()
    return lib


def quantise_rows(values: np.ndarray, kind: int) -> np.ndarray:
    """Quantise fp32 rows [n, width] to ggml's type number `kind`; return uint8 [n, bytes]."""
    import gguf

    values = np.ascontiguousarray(values, dtype=np.float32)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    rows, width = values.shape
    result = np.empty((rows, width // block * size), dtype=np.uint8)
    written = library().ggml_quantize_chunk(
        kind, values.ctypes.data, result.ctypes.data, 0, rows, width, None
    )
    assert written == result.nbytes
    return result


def _error_text() -> str:
    return "; ".join(_errors) or "llama.cpp gives no reason"


def probe(path: Path) -> None:
    """Load a GGUF file and compute a token in a subprocess; ValueError if this fails.

    Finds damage that check_gguf misses before this process loads the file. The result is cached per
    version of a file.
    """
    check_gguf(path)
    status = path.stat()
    _probed(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=64)
def _probed(path: Path, size: int, changed: int, inode: int) -> None:
    library()  # raise here if the library is missing: the file is not at fault
    command = [sys.executable, "-m", "inference.llamacpp", str(path)]
    root, seconds = Path(__file__).resolve().parent.parent, PROBE_SECONDS + size / PROBE_RATE
    try:
        result = subprocess.run(
            command, cwd=root, capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"llama.cpp does not finish reading {path} in {seconds:.0f} s, so the file is damaged; "
            "copy or export it again"
        ) from None
    if result.returncode == REFUSED:
        raise ValueError(result.stdout.decode(errors="replace").strip())
    if result.returncode:
        raise ValueError(
            f"llama.cpp crashes on {path} (exit status {result.returncode}), so the file is "
            "damaged; copy or export it again"
        )


REFUSED = 3  # exit status of _probe


def _probe(path: Path) -> int:
    """Run in the subprocess of `probe`; return its exit status."""
    try:
        check_weights(path)
        with LlamaCpp(path, PROBE_CONTEXT, threads=1, probed=True) as runtime:
            runtime.encode("a b\n1")
            runtime.feed([0])
            runtime.decode([0])
    except (ValueError, RuntimeError) as error:
        print(error)
        return REFUSED
    return 0


def check_weights(path: Path) -> None:
    """ValueError if a weight or scale of a GGUF file is not finite, by ggml's own check."""
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    for name, tensor in check_gguf(path).tensors.items():
        data = raw[tensor.offset : tensor.offset + tensor.size]
        if not library().ggml_validate_row_data(tensor.kind, data.ctypes.data, tensor.size):
            raise ValueError(
                f"{path} is damaged: the tensor {name} holds values that are not finite; "
                "copy or export it again"
            )


def _available_memory() -> float:
    """Return the machine's available memory in bytes; infinity if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(
            float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration):
        return float("inf")


class LlamaCpp:
    """Runs a GGUF file on the CPU with one sequence of tokens; `feed` extends it."""

    def __init__(
        self, path: Path, context: int | None = None, threads: int = 0, probed: bool = False
    ):
        """context: maximum tokens (default: the file's context length). probed: skip `probe`.

        ValueError if the file is damaged, llama.cpp cannot read it, or memory is too small.
        """
        self.model = self.state = None
        content = check_gguf(path)
        length = min(
            context or content.of_model("context_length"), content.of_model("context_length")
        )
        need, free = content.cache_bytes(length), _available_memory()
        if need > free:
            raise ValueError(
                f"a context of {length:,} tokens needs {need / 1e9:.1f} GB of memory for "
                f"{path.name}, but {free / 1e9:.1f} GB are available; give a smaller --context"
            )
        if not probed:
            probe(path)
        self.lib = lib = library()
        _errors.clear()
        self.model = lib.llama_model_load_from_file(
            os.fsencode(path), lib.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(
                f"llama.cpp cannot read {path}: {_error_text()}; copy or export it again"
            )
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.vocab_size = lib.llama_vocab_n_tokens(self.vocab)
        self.trained = lib.llama_model_n_ctx_train(self.model)
        self.context = min(context or self.trained, self.trained)
        params = lib.llama_context_default_params()
        params.numbers[0], params.numbers[1], params.numbers[2] = self.context, BATCH, BATCH
        self.state = lib.llama_init_from_model(self.model, params)
        if not self.state:
            raise ValueError(
                f"llama.cpp cannot run {path} with a context of {self.context} tokens: "
                f"{_error_text()}; give a smaller --context"
            )
        threads = threads or cpus()
        lib.llama_set_n_threads(self.state, threads, threads)
        self.tokens: list[int] = []  # the sequence so far

    def close(self) -> None:
        if self.state:
            self.lib.llama_free(self.state)
        if self.model:
            self.lib.llama_model_free(self.model)
        self.model = self.state = None

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Tokenize without bos or eos. special: parse CONTROL tokens in the text."""
        data = text.encode()
        size = len(data) + 8
        ids = (c_int32 * size)()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, size, False, special)
        assert count >= 0
        return list(ids[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """Detokenize, special tokens included."""
        size = 64 + 64 * len(ids)
        buffer = ctypes.create_string_buffer(size)
        count = self.lib.llama_detokenize(
            self.vocab, (c_int32 * len(ids))(*ids), len(ids), buffer, size, False, True
        )
        assert count >= 0
        return buffer.raw[:count].decode(errors="replace")

    def ends_reply(self, token: int) -> bool:
        """True if this is an end-of-generation token of llama.cpp."""
        return self.lib.llama_vocab_is_eog(self.vocab, token)

    def truncate(self, length: int = 0) -> None:
        """Shorten the sequence to its first `length` tokens."""
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.state), 0, length, -1)
        del self.tokens[length:]

    def feed(self, ids: Sequence[int], last: int = 1) -> np.ndarray:
        """Append tokens; return fp32 logits [last, V] after each of the `last` final tokens."""
        length = len(self.tokens) + len(ids)
        if length > self.context:
            raise ValueError(
                f"{length} tokens do not fit a context of {self.context}; shorten the text or "
                "raise --context"
            )
        if not ids:
            raise ValueError("feed needs at least one token")
        unknown = [index for index in ids if not 0 <= index < self.vocab_size]
        if unknown:
            raise ValueError(f"token {unknown[0]} is not in the vocabulary of {self.vocab_size}")
        outputs = []
        for begin in range(0, len(ids), BATCH):
            chunk = ids[begin : begin + BATCH]
            n = len(chunk)
            needed = [int(begin + i >= len(ids) - last) for i in range(n)]
            batch = _Batch(n, (c_int32 * n)(*chunk), None, None, None, None, (c_int8 * n)(*needed))
            status = self.lib.llama_decode(self.state, batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}: {_error_text()}")
            self.tokens += chunk
            if rows := sum(needed):
                pointer = self.lib.llama_get_logits(self.state)
                outputs.append(np.ctypeslib.as_array(pointer, (rows, self.vocab_size)).copy())
        logits = np.concatenate(outputs)
        if not np.isfinite(logits).all():
            raise ValueError(
                "the model's logits are not finite: its weights are damaged; "
                "restore the file from a copy"
            )
        return logits


if __name__ == "__main__":
    sys.exit(_probe(Path(sys.argv[1])))

"""llama.cpp through its C functions, out of a wheel: xllamacpp (prebuilt) or llama-cpp-python. Tokens in, logits out.

Of its structs only the beginnings are named here; they are passed in buffers larger than any version's, which the calling
conventions of x86-64 and AArch64 allow.
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

BATCH = 512  # tokens that are computed at once
MAX_ERROR_LINES = 4  # lines of llama.cpp's errors that are repeated
PROBE_CONTEXT, PROBE_SECONDS, PROBE_RATE = (
    64,
    10,
    50e6,
)  # tokens; s for any file; bytes/s that a load takes at most besides
_errors: list[str] = []


class _Params(ctypes.Structure):
    """llama_model_params, or llama_context_params, which begins with n_ctx, n_batch, n_ubatch."""

    _fields_ = (("numbers", c_uint32 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),  # without positions and sequences it goes on with sequence 0
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
    """The package that brings llama.cpp, and its library; None where none is installed."""
    for package, pattern in (("xllamacpp", "xllamacpp*.so"), ("llama_cpp", "lib/libllama.*")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(place).glob(pattern)):
                return package, path
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The functions of llama.cpp; ValueError where no package brings them."""
    found = find_library()
    if found is None:
        raise ValueError(
            "no llama.cpp is installed; pip install xllamacpp (a prebuilt wheel) or llama-cpp-python"
        )
    for base in sorted(
        found[1].parent.glob("libggml-base.*")
    ):  # llama-cpp-python has ggml in libraries of its own
        ctypes.CDLL(str(base), mode=ctypes.RTLD_GLOBAL)
    try:
        lib = ctypes.CDLL(str(found[1]))
    except OSError as error:
        raise ValueError(f"the llama.cpp of {found[0]} does not load: {error}") from None
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise ValueError(
                f"{found[0]} does not offer llama.cpp's {name}; pip install xllamacpp"
            ) from None
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(ctypes.cast(_log, c_void_p), None)
    lib.llama_backend_init()
    return lib


def quantise_rows(values: np.ndarray, kind: int) -> np.ndarray:
    """fp32 rows [n, width] as ggml's type of that number, uint8 [n, bytes]."""
    import gguf

    values = np.ascontiguousarray(values, dtype=np.float32)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    rows, width = values.shape
    result = np.empty((rows, width // block * size), dtype=np.uint8)
    done = library().ggml_quantize_chunk(
        kind, values.ctypes.data, result.ctypes.data, 0, rows, width, None
    )
    assert done == result.nbytes
    return result


def _said() -> str:
    return "; ".join(_errors) or "it does not say why"


def probe(path: Path) -> None:
    """Load a GGUF file in a process of its own and compute a token; ValueError where that fails, crashes or does not end.

    Catches what check_gguf does not know of, before this process runs the same code. Once for each state of a file.
    """
    check_gguf(path)
    status = path.stat()
    _probed(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=64)
def _probed(path: Path, size: int, changed: int, inode: int) -> None:
    library()  # a missing library is not the file's fault
    command = [sys.executable, "-m", "inference.llamacpp", str(path)]
    root, seconds = Path(__file__).resolve().parent.parent, PROBE_SECONDS + size / PROBE_RATE
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"llama.cpp does not finish reading {path} in {seconds:.0f} s; it is damaged"
        ) from None
    if done.returncode == REFUSED:
        raise ValueError(done.stdout.decode(errors="replace").strip())
    if done.returncode:
        raise ValueError(
            f"llama.cpp cannot read {path}: it ends with status {done.returncode}; the file is damaged"
        )


REFUSED = 3  # exit status of _probe


def _probe(path: Path) -> int:
    """What the process of `probe` does."""
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
    """ValueError where a tensor of a GGUF file holds values or scales that are not finite, by ggml's own check."""
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    for name, tensor in check_gguf(path).tensors.items():
        data = raw[tensor.offset : tensor.offset + tensor.size]
        if not library().ggml_validate_row_data(tensor.kind, data.ctypes.data, tensor.size):
            raise ValueError(
                f"{path} is damaged: the tensor {name} holds values that are not finite; copy or export it again"
            )


def _available_memory() -> float:
    """Bytes that this machine can give; infinite where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(
            float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration):
        return float("inf")


class LlamaCpp:
    """A GGUF file on the CPU: one sequence, which `feed` continues."""

    def __init__(
        self, path: Path, context: int | None = None, threads: int = 0, probed: bool = False
    ):
        """context: tokens that fit, by default as many as the file says. probed: skip `probe`.

        ValueError where the file is damaged, llama.cpp cannot read it, or the context does not fit the memory.
        """
        self.model = self.state = None
        content = check_gguf(path)
        length = min(
            context or content.of_model("context_length"), content.of_model("context_length")
        )
        need, free = content.cache_bytes(length), _available_memory()
        if need > free:
            raise ValueError(
                f"a context of {length:,} tokens needs {need / 1e9:.1f} GB of memory for {path.name}, but {free / 1e9:.1f} GB "
                "are available; give a smaller --context"
            )
        if not probed:
            probe(path)
        self.lib = lib = library()
        _errors.clear()
        self.model = lib.llama_model_load_from_file(
            os.fsencode(path), lib.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(f"llama.cpp cannot read {path}: {_said()}")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.size = lib.llama_vocab_n_tokens(self.vocab)
        self.trained = lib.llama_model_n_ctx_train(self.model)
        self.context = min(context or self.trained, self.trained)
        params = lib.llama_context_default_params()
        params.numbers[0], params.numbers[1], params.numbers[2] = self.context, BATCH, BATCH
        self.state = lib.llama_init_from_model(self.model, params)
        if not self.state:
            raise ValueError(
                f"llama.cpp cannot run {path} with a context of {self.context} tokens: {_said()}"
            )
        threads = threads or len(os.sched_getaffinity(0))
        lib.llama_set_n_threads(self.state, threads, threads)
        self.held: list[int] = []  # the sequence

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
        """Ids of a text, with nothing put around it. special: text that looks like a CONTROL token is one."""
        data = text.encode()
        room = len(data) + 8
        ids = (c_int32 * room)()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, room, False, special)
        assert count >= 0
        return list(ids[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included, as llama.cpp writes it."""
        room = 64 + 64 * len(ids)
        buffer = ctypes.create_string_buffer(room)
        count = self.lib.llama_detokenize(
            self.vocab, (c_int32 * len(ids))(*ids), len(ids), buffer, room, False, True
        )
        assert count >= 0
        return buffer.raw[:count].decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Does llama.cpp end a reply at this token?"""
        return self.lib.llama_vocab_is_eog(self.vocab, token)

    def keep(self, count: int = 0) -> None:
        """Forget all of the sequence but its first tokens."""
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.state), 0, count, -1)
        del self.held[count:]

    def feed(self, ids: Sequence[int], last: int = 1) -> np.ndarray:
        """Continue the sequence; logits fp32 [last, V] after each of its last tokens."""
        if len(self.held) + len(ids) > self.context:
            raise ValueError(
                f"{len(self.held) + len(ids)} tokens do not fit a context of {self.context}"
            )
        odd = [index for index in ids if not 0 <= index < self.size]
        if odd or not ids:
            raise ValueError(
                f"token {odd[0]} is not in the vocabulary of {self.size}"
                if odd
                else "no tokens to feed"
            )
        parts = []
        for begin in range(0, len(ids), BATCH):
            part = ids[begin : begin + BATCH]
            n = len(part)
            wanted = [int(begin + i >= len(ids) - last) for i in range(n)]
            batch = _Batch(n, (c_int32 * n)(*part), None, None, None, None, (c_int8 * n)(*wanted))
            status = self.lib.llama_decode(self.state, batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}: {_said()}")
            self.held += part
            if rows := sum(wanted):
                parts.append(
                    np.ctypeslib.as_array(
                        self.lib.llama_get_logits(self.state), (rows, self.size)
                    ).copy()
                )
        logits = np.concatenate(parts)
        if not np.isfinite(logits).all():
            raise ValueError(
                "the model's logits are not finite; its weights are damaged, take another copy of the file"
            )
        return logits


if __name__ == "__main__":
    sys.exit(_probe(Path(sys.argv[1])))

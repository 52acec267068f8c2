"""Evaluation engine for GGUF files: one llama.cpp sequence that reuses the cached prefix."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from evals.harness import Generation, Scored, Write
from evals.language_model import EvalTokenizer, ScoreRequest, build_constraint
from inference.gguf_tokenizer import field, open_gguf
from inference.llamacpp import BATCH, LlamaCpp
from inference.runners import shared_prefix
from inference.sampling import Sampling, next_token, uniforms


class GgufEngine:
    """Scores and generates on the CPU, one request at a time, with llama.cpp's fp16 KV cache."""

    def __init__(self, path: Path, threads: int):
        import gguf

        file_type = field(open_gguf(path), "general.file_type")
        names = {
            int(member): member.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()
            for member in gguf.LlamaFileType
        }
        self.runtime = LlamaCpp(path, threads=threads)
        self.context = self.runtime.context
        self.dtype = f"gguf_{names.get(file_type, file_type)}"

    def _prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits [1, V] after these tokens; reuses the cached prefix."""
        shared = shared_prefix(self.runtime.tokens, ids)
        self.runtime.truncate(shared)
        return torch.from_numpy(self.runtime.feed(ids[shared:]))

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[list[tuple[int, list[Scored]]]]:
        # Sorted contexts share prefixes with their neighbours.
        for i in sorted(range(len(requests)), key=lambda i: requests[i].context):
            context, logits = requests[i].context, self._prefill(requests[i].context)
            scored = []
            for continuation in requests[i].continuations:
                self.runtime.truncate(len(context))
                scored.append(self._score_continuation(logits, continuation))
            yield [(i, scored)]

    def _score_continuation(self, logits: torch.Tensor, ids: Sequence[int]) -> Scored:
        """Score token ids; logits [1, V] predict the first one."""
        total, greedy, start = 0.0, True, 0
        while start < len(ids):
            targets = torch.tensor(ids[start : start + len(logits)])
            logprobs = logits[torch.arange(len(targets)), targets] - logits.logsumexp(-1)
            total += logprobs.double().sum().item()
            greedy = greedy and bool((logits.argmax(-1) == targets).all())
            inputs = ids[start + len(targets) - 1 : -1][:BATCH]
            start += len(targets)
            if inputs:
                logits = torch.from_numpy(self.runtime.feed(inputs, last=len(inputs)))
        return Scored(total, len(ids), greedy)

    def write(
        self, prompts: Sequence[list[int]], requests: Sequence[Write], tokenizer: EvalTokenizer
    ) -> Iterator[list[tuple[int, Generation]]]:
        for i in sorted(range(len(prompts)), key=lambda i: prompts[i]):
            yield [(i, self._generate(prompts[i], requests[i], tokenizer))]

    def _generate(self, prompt: list[int], request: Write, tokenizer: EvalTokenizer) -> Generation:
        sampling = Sampling(temperature=request.temperature, top_p=request.top_p)
        draws = uniforms([request.seed], request.max_tokens)[0]
        constraint = build_constraint(request, tokenizer, self.runtime.vocab_size)
        logits, new = self._prefill(prompt), list[int]()
        while True:
            if constraint is not None:
                constraint.mask(logits[0])
            new.append(int(next_token(logits, sampling, None, draws[len(new) : len(new) + 1])[0]))
            if (
                len(new) == request.max_tokens
                or new[-1] in tokenizer.stops
                or tokenizer.ended(new, request)
            ):
                return tokenizer.written(new, request)
            if constraint is not None:
                constraint.accept(new[-1])
            logits = torch.from_numpy(self.runtime.feed(new[-1:]))

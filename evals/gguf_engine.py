"""A GGUF file that answers the harness: one sequence in llama.cpp, of which what follows takes up what it can."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from evals.harness import Scored, Write, Written
from evals.language_model import EvalTokenizer, ScoreRequest, constraint_of
from inference.gguf_tokenizer import field, open_gguf
from inference.llamacpp import BATCH, LlamaCpp
from inference.runners import common
from inference.sampling import Sampling, choose, uniforms


class GgufEngine:
    """Scores and writes on the CPU, item by item. Keys and values are fp16, as llama.cpp keeps them."""

    def __init__(self, path: Path, threads: int):
        import gguf

        kind = field(open_gguf(path), "general.file_type")
        kinds = {
            int(each): each.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()
            for each in gguf.LlamaFileType
        }
        self.runtime = LlamaCpp(path, threads=threads)
        self.context = self.runtime.context
        self.dtype = f"gguf_{kinds.get(kind, kind)}"

    def _after(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits [1, V] after these tokens, of which what the sequence begins with is not computed again."""
        shared = common(self.runtime.held, ids)
        self.runtime.keep(shared)
        return torch.from_numpy(self.runtime.feed(ids[shared:]))

    def score(self, units: Sequence[ScoreRequest]) -> Iterator[list[tuple[int, list[Scored]]]]:
        for i in sorted(
            range(len(units)), key=lambda i: units[i].context
        ):  # neighbours begin alike
            context, after = units[i].context, self._after(units[i].context)
            scored = []
            for option in units[i].options:
                self.runtime.keep(len(context))
                scored.append(self._option(after, option))
            yield [(i, scored)]

    def _option(self, logits: torch.Tensor, option: Sequence[int]) -> Scored:
        """An option's tokens, the first by these logits [1, V], the others by those that they get one after another."""
        total, greedy, place = 0.0, True, 0
        while place < len(option):
            wanted = torch.tensor(option[place : place + len(logits)])
            found = logits[torch.arange(len(wanted)), wanted] - logits.logsumexp(-1)
            total += found.double().sum().item()
            greedy = greedy and bool((logits.argmax(-1) == wanted).all())
            fed = option[place + len(wanted) - 1 : -1][:BATCH]
            place += len(wanted)
            if fed:
                logits = torch.from_numpy(self.runtime.feed(fed, last=len(fed)))
        return Scored(total, len(option), greedy)

    def write(
        self, prompts: Sequence[list[int]], requests: Sequence[Write], words: EvalTokenizer
    ) -> Iterator[list[tuple[int, Written]]]:
        for i in sorted(range(len(prompts)), key=lambda i: prompts[i]):
            yield [(i, self._written(prompts[i], requests[i], words))]

    def _written(self, prompt: list[int], request: Write, words: EvalTokenizer) -> Written:
        how = Sampling(temperature=request.temperature, top_p=request.top_p)
        luck = uniforms([request.seed], request.max_tokens)[0]
        constraint = constraint_of(request, words, self.runtime.size)
        logits, new = self._after(prompt), list[int]()
        while True:
            if constraint is not None:
                constraint.mask(logits[0])
            new.append(int(choose(logits, how, None, luck[len(new) : len(new) + 1])[0]))
            if (
                len(new) == request.max_tokens
                or new[-1] in words.stops
                or words.ended(new, request)
            ):
                return words.written(new, request)
            if constraint is not None:
                constraint.accept(new[-1])
            logits = torch.from_numpy(self.runtime.feed(new[-1:]))

"""Tool calls as valid JSON: xgrammar says which tokens may come next."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class JsonGrammar:
    """A JSON schema made ready for one tokenizer; `constraint()` gives what holds one row to it.

    tokenizer: of transformers; vocab_size: the model's, which may have more rows than the tokenizer has tokens.
    White space between tokens of the JSON is not allowed, else a small model may write nothing else. Strings and
    numbers should be bounded in the schema (`maxLength`, `maximum`), or nothing makes the model close them.
    """

    def __init__(self, schema: dict[str, Any] | str, tokenizer: Any, vocab_size: int):
        self.xgrammar, compiler, self.barred = _compiler(tokenizer, vocab_size)
        self.vocab_size = vocab_size
        text = schema if isinstance(schema, str) else json.dumps(schema)
        self.compiled = compiler.compile_json_schema(text, any_whitespace=False)

    def constraint(
        self,
        after: int | None = None,
        then: int | Sequence[int] | None = None,
        room: int | None = None,
    ) -> "JsonConstraint":
        """For one row: JSON from the start, or whenever the token `after` came; it is followed by a token of `then`.

        Markers are given as token ids, since a marker within a grammar may be spelled out in ordinary tokens. room: tokens
        that the row may have; when half of them are used, `after` no longer comes out of `then`, or JSON would be cut off.
        """
        return JsonConstraint(self, after, then, room)


@functools.lru_cache(maxsize=4)
def _compiler(tokenizer: Any, vocab_size: int) -> tuple[Any, Any, Tensor]:
    """xgrammar, its compiler for a tokenizer, and tokens that it allows in strings, but must not come.

    What schemas have in common is compiled once (3 s for a string of 80). To xgrammar 0.2.8 a special token that is no end token
    is text like any other, and a bounded string may hold control characters, which JSON forbids.
    """
    try:
        import xgrammar
    except ImportError:
        raise ValueError(
            "generation by a grammar needs xgrammar; pip install xgrammar==0.2.8"
        ) from None
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    barred = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    barred |= {
        index for index, text in enumerate(info.decoded_vocab) if any(byte < 0x20 for byte in text)
    }
    return xgrammar, xgrammar.GrammarCompiler(info), torch.tensor(sorted(barred), dtype=torch.long)


class JsonConstraint:
    """Masks the scores of one row while it writes JSON; free text before and after."""

    def __init__(
        self,
        grammar: JsonGrammar,
        after: int | None,
        then: int | Sequence[int] | None,
        room: int | None = None,
    ):
        self.grammar, self.after = grammar, after
        self.then = (
            None if then is None else torch.tensor([then] if isinstance(then, int) else list(then))
        )
        self.room, self.came = room, 0
        self.bits = grammar.xgrammar.allocate_token_bitmask(1, grammar.vocab_size)
        self.force: Tensor | None = None
        self.matcher = self._start() if after is None else None

    def _start(self) -> Any:
        return self.grammar.xgrammar.GrammarMatcher(
            self.grammar.compiled, terminate_without_stop_token=True
        )

    def mask(self, scores: Tensor) -> None:
        """Set the scores [V] of tokens that may not come next to -inf."""
        if self.force is not None:
            places = self.force.to(scores.device)
            kept = scores[places].clone()
            scores.fill_(-torch.inf)[places] = kept
        elif self.matcher is not None:
            self.matcher.fill_next_token_bitmask(self.bits)
            self.grammar.xgrammar.apply_token_bitmask_inplace(
                scores[None], self.bits.to(scores.device)
            )
            scores[self.grammar.barred.to(scores.device)] = -torch.inf

    def accept(self, token: int) -> None:
        """Take note of the token that came."""
        self.came += 1
        if self.matcher is not None:
            accepted = self.matcher.accept_token(token)
            assert accepted, "a token was drawn that the mask forbids"
            if self.matcher.is_terminated():
                self.matcher, self.force = None, self.then
                if self.then is not None and self.room is not None and 2 * self.came >= self.room:
                    self.force = self.then[self.then != self.after]
            return
        self.force = None
        if token == self.after:
            self.matcher = self._start()

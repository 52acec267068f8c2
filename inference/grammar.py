"""Constrained generation: xgrammar restricts the next tokens to valid JSON, e.g. a tool call."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.chat.rendering import marker_tokens
from machine import exact


class JsonGrammar:
    """A JSON schema compiled for one tokenizer; `constraint()` applies it to one row.

    tokenizer: a transformers tokenizer. vocab_size: the model's; may exceed the tokenizer's.
    White space between JSON tokens is forbidden, because a small model may generate nothing else.
    Bound strings and numbers in the schema (`maxLength`, `maximum`): only these limits end them.
    """

    def __init__(self, schema: dict[str, Any] | str, tokenizer: Any, vocab_size: int):
        self.xgrammar, compiler, self.forbidden = _compiler(tokenizer, vocab_size)
        self.vocab_size = vocab_size
        text = schema if isinstance(schema, str) else json.dumps(schema)
        self.compiled = compiler.compile_json_schema(text, any_whitespace=False)

    def constraint(
        self,
        marker: int | None = None,
        followers: int | Sequence[int] | None = None,
        max_tokens: int | None = None,
    ) -> "JsonConstraint":
        """Constrain one row to JSON from the start, or after each `marker` token.

        followers: tokens allowed right after the JSON. marker and followers are ids, since ordinary
        tokens could spell the same text. max_tokens: token limit of the row; after half
        of it, `marker` may not follow, because the limit could truncate another JSON value.
        """
        return JsonConstraint(self, marker, followers, max_tokens)


@functools.lru_cache(maxsize=4)
def _compiler(tokenizer: Any, vocab_size: int) -> tuple[Any, Any, Tensor]:
    """Return xgrammar, its compiler for a tokenizer, and additional tokens to forbid.

    The compiler shares the common parts of schemas (3 s for a string of 80). xgrammar 0.2.8 treats
    special tokens other than end tokens as text, and allows control characters in bounded strings,
    which JSON forbids.
    """
    try:
        import xgrammar
    except ImportError:
        raise ValueError(
            "constrained generation needs xgrammar; pip install xgrammar==0.2.8"
        ) from None
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    added = tokenizer.added_tokens_decoder
    markers = marker_tokens(added.values())
    forbidden = {index for index, token in added.items() if token.content in markers}
    forbidden |= {
        index for index, text in enumerate(info.decoded_vocab) if any(byte < 0x20 for byte in text)
    }
    compiler = xgrammar.GrammarCompiler(info)
    return xgrammar, compiler, torch.tensor(sorted(forbidden), dtype=torch.long)


class JsonConstraint:
    """Masks one row's scores inside JSON; text before and after it is unconstrained."""

    def __init__(
        self,
        grammar: JsonGrammar,
        marker: int | None,
        followers: int | Sequence[int] | None,
        max_tokens: int | None = None,
    ):
        self.grammar, self.marker = grammar, marker
        ids = [followers] if isinstance(followers, int) else followers
        self.followers = None if ids is None else torch.tensor(list(ids))
        self.max_tokens, self.length = max_tokens, 0
        self.bits = grammar.xgrammar.allocate_token_bitmask(1, grammar.vocab_size)
        self.force: Tensor | None = None
        self.matcher = self._start() if marker is None else None

    def _start(self) -> Any:
        return self.grammar.xgrammar.GrammarMatcher(
            self.grammar.compiled, terminate_without_stop_token=True
        )

    def mask(self, scores: Tensor) -> None:
        """Set the scores [V] of forbidden tokens to -inf, in place."""
        if self.force is not None:
            allowed = self.force.to(scores.device)
            allowed_scores = scores[allowed].clone()
            scores.fill_(-torch.inf)[allowed] = allowed_scores
        elif self.matcher is not None:
            self.matcher.fill_next_token_bitmask(self.bits)
            row = exact(scores[None])  # on mps, xgrammar would compile a kernel
            self.grammar.xgrammar.apply_token_bitmask_inplace(row, self.bits.to(row.device))
            if row.device != scores.device:
                scores.copy_(row[0])
            scores[self.grammar.forbidden.to(scores.device)] = -torch.inf

    def accept(self, token: int) -> None:
        """Advance by the token that was generated."""
        self.length += 1
        if self.matcher is not None:
            accepted = self.matcher.accept_token(token)
            assert accepted, "the sampled token is forbidden by the mask"
            if self.matcher.is_terminated():
                self.matcher, self.force = None, self.followers
                is_late = self.max_tokens is not None and 2 * self.length >= self.max_tokens
                if self.followers is not None and is_late:
                    self.force = self.followers[self.followers != self.marker]
            return
        self.force = None
        if token == self.marker:
            self.matcher = self._start()

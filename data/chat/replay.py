"""Replay in SFT: pretraining text from a data store, mixed into the conversations.

Rows of packed text, trained on every token, keep a model from forgetting the text (replay when the
data change: arXiv:2403.08763). A text source is named "replay.SOURCE" in the mixture and the logs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data.chat.tokenizer import chat_tokenizer
from data.dataloader import Batch, validation_batches
from data.packing import Source
from data.store import open_shards
from data.tokenizers.bpe import load_tokenizer, vocabulary_size
from ranges import NonEmptyText, PositiveFloat, above, check_fields

PREFIX = "replay."


@dataclass(frozen=True)
class ReplayConfig:
    """Pretraining text in SFT."""

    store: NonEmptyText  # folder with tokenizer/ and tokens/<source>/
    mix: dict[str, PositiveFloat]  # source -> weight of its tokens in the text
    # Of the trained tokens; the others are in conversations
    share: Annotated[float, above(0, below=1, hint="remove the section for no text")]

    def __post_init__(self) -> None:
        check_fields(self, "replay")


def mixture(mix: Mapping[str, float], replay: ReplayConfig | None) -> dict[str, float]:
    """Return the weights of conversations and text, as shares of trained tokens.

    mix: of the conversations; without replay it is returned as it is. ValueError for a source of
    conversations with a name of the text.
    """
    if replay is None:
        return dict(mix)
    for name in mix:
        if f"{name}.".startswith(PREFIX):
            raise ValueError(f"data.mix.{name} has a name of the replayed text; rename the source")
    conversations, text = sum(mix.values()), sum(replay.mix.values())
    shares = {name: (1 - replay.share) * weight / conversations for name, weight in mix.items()}
    return shares | {PREFIX + name: replay.share * w / text for name, w in replay.mix.items()}


def open_replay(replay: ReplayConfig, split: str, tokenizer: Path) -> dict[str, Source]:
    """Open one split of the text; tokenizer: folder of the model's chat tokenizer.

    ValueError if the store lacks a source, or if its tokenizer is not that of the model. Both are
    compared with the chat tokens added, since the base model may have them already.
    """
    folder = Path(replay.store) / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"replay.store={replay.store} has no tokenizer; give the data store of the base "
            "model's pretraining"
        )
    if chat_tokenizer(folder)[0].to_str() != load_tokenizer(tokenizer).to_str():
        raise ValueError(
            f"the text of replay.store={replay.store} has another tokenizer than the base model; "
            "give the data store of its pretraining"
        )
    vocabulary = vocabulary_size(load_tokenizer(folder))
    shards = open_shards(replay.store, replay.mix, split, vocabulary, section="replay.mix")
    return {PREFIX + name: source for name, source in shards.items()}


def replay_validation(
    replay: ReplayConfig,
    tokenizer: Path,
    length: int,
    batch_size: int,
    rows: int,
    rank: int,
    world: int,
) -> tuple[dict[str, list[Batch]], list[str]]:
    """Return the validation batches of each source of the text, and lines for the log.

    rows: at most, per source, of `length` tokens. A source without a full row has no batches and a
    line.
    """
    batches, lines = {}, [f"replayed text is {replay.share:.1%} of the trained tokens"]
    for name, source in open_replay(replay, "val", tokenizer).items():
        if len(source) > length:
            batches[name] = validation_batches(source, length, batch_size, rows, rank, world)
        else:
            lines.append(
                f"warning: {name} has no validation loss: its text is below {length} tokens"
            )
    return batches, lines

"""Figures of held-out text from sums over blocks, and their standard errors by a jackknife.

Loss and bits per byte are ratios of sums over all tokens, not means over items. So the scored rows
or documents of a source are split into up to MAX_BLOCKS equal consecutive blocks. Neighbouring rows
often belong to one document; different blocks are nearly independent. The error is the
delete-one-block jackknife (Tukey 1958; over strata: Wolter, Introduction to Variance Estimation,
2007, section 4.5):

    stderr^2 = sum over sources of (n - 1) / n * sum over its n blocks of (f_b - mean of f_b)^2

f_b is the figure of the text without block b. The other blocks of the same source then count
n / (n - 1) times, so that the source keeps its weight among the sources. The error covers the
choice of the text, not the seed of the training run.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

MAX_BLOCKS = 32
SUMS = ("nats", "tokens", "bytes")
RATIOS = ("loss", "perplexity", "bits_per_byte")  # the figures with an error
Blocks = Mapping[str, Sequence[float]]  # each of SUMS -> its value in every block
Sources = Mapping[str, Blocks]


def figures(nats: float, tokens: float, text_bytes: float) -> dict[str, float]:
    """loss (nats per token), perplexity, bits_per_byte and tokens, from sums over a text."""
    loss = nats / tokens if tokens else math.nan
    perplexity = math.exp(loss) if loss < 700 else math.inf
    bits = nats / math.log(2) / text_bytes if text_bytes else math.nan
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "tokens": tokens}


def blocks_of(rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Sum rows (nats, tokens, bytes) over up to MAX_BLOCKS equal consecutive blocks."""
    count = min(MAX_BLOCKS, len(rows))
    borders = [len(rows) * i // count for i in range(count + 1)]
    return {
        name: [math.fsum(row[i] for row in rows[begin:end]) for begin, end in pairwise(borders)]
        for i, name in enumerate(SUMS)
    }


def total(sources: Sources) -> list[float]:
    """Nats, tokens and bytes of all sources."""
    return [math.fsum(math.fsum(blocks[name]) for blocks in sources.values()) for name in SUMS]


def stderrs(sources: Sources) -> dict[str, float | None]:
    """Standard error of each of RATIOS over all sources together.

    None if a source has fewer than two blocks, or a figure without one block is not finite.
    """
    replicates = _replicates(sources)
    return {
        name: _stderr([[without[name] for without in source] for source in replicates])
        for name in RATIOS
    }


def change_stderr(before: Sources, after: Sources, metric: str) -> float | None:
    """Standard error of the change of one of RATIOS between two models, paired by block.

    Both must have scored the same blocks of the same text.
    """
    pairs = zip(_replicates(before), _replicates(after), strict=True)
    return _stderr(
        [[new[metric] - old[metric] for old, new in zip(*source, strict=True)] for source in pairs]
    )


def _replicates(sources: Sources) -> list[list[dict[str, float]]]:
    """Per source: the figures of all text without one block, for each of its blocks.

    Empty for a source with fewer than two blocks.
    """
    everything = total(sources)
    replicates = []
    for blocks in sources.values():
        n = len(blocks["tokens"])
        source = total({"": blocks})
        without = [
            [
                all_text + (of_source - n * of_block) / (n - 1)
                for all_text, of_source, of_block in zip(everything, source, block, strict=True)
            ]
            for block in zip(*(blocks[name] for name in SUMS), strict=True)
            if n > 1
        ]
        replicates.append([figures(*sums) for sums in without])
    return replicates


def _stderr(replicates: Sequence[Sequence[float]]) -> float | None:
    """Jackknife error from the figure without each block, per source."""
    if any(len(values) < 2 for values in replicates):
        return None
    variances = []
    for values in replicates:
        n, mean = len(values), math.fsum(values) / len(values)
        variances.append((n - 1) / n * math.fsum((x - mean) * (x - mean) for x in values))
    stderr = math.sqrt(math.fsum(variances))
    return stderr if math.isfinite(stderr) else None

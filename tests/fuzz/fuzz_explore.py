"""Executions without a fuzzing engine: seeds, changed at random, and bytes that are random altogether.

Since every byte of an input is a decision, that reaches most of what can be reached. It is what the tests
run, and what is left where atheris has no wheel.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

_MAX_BYTES = 400


def inputs(seeds: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """The seeds, then without end what comes of them."""
    yield from seeds
    rng = random.Random(seed)
    while True:
        data = bytearray(
            rng.choice(seeds) if rng.random() < 0.5 else rng.randbytes(rng.randrange(_MAX_BYTES))
        )
        for _ in range(rng.randrange(6)):
            at = rng.randrange(len(data) + 1)
            if at < len(data) and rng.random() < 0.7:
                data[at] = rng.randrange(256)
            else:
                data[at:at] = rng.randbytes(rng.randrange(8))
        yield bytes(data)


def explore(run: Callable[[bytes], str], seeds: Sequence[bytes], executions: int, seed: int) -> Counter[str]:
    """Execute ``run`` so many times, and count what came of it.

    Raises:
        AssertionError: it raised; the message has the input.
    """
    outcomes: Counter[str] = Counter()
    for _, data in zip(range(executions), inputs(seeds, seed), strict=False):
        try:
            outcomes[run(data)] += 1
        except Exception as error:
            raise AssertionError(f"bytes.fromhex({data.hex()!r}): {error!r}") from error
    return outcomes

"""How much is measured: enough for a number to rely on, or just enough to see that it can be measured."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Counts and durations; those of a full run are guesses at what makes the ratios repeatable within a few percent.

    Attributes:
        quick: Whether the numbers mean nothing but that everything works.
        rounds: Times that each side of a comparison of single calls is timed.
        warmup: Rounds before those, not counted.
        block_seconds: Length of one block of sustained work.
        blocks: Pairs of such blocks, ours and the bare one's.
        settle_seconds: From the start or end of sustained work until it counts as steady.
        idle_seconds: For how long CPU time is counted.
        idle_containers: Warm containers meanwhile.
        few, many: Warm containers between which memory is compared.
        swings: Times that it is.
    """

    quick: bool = False
    rounds: int = 300
    warmup: int = 10
    block_seconds: float = 8.0
    blocks: int = 6
    settle_seconds: float = 2.0
    idle_seconds: float = 60.0
    idle_containers: int = 50
    few: int = 5
    many: int = 55
    swings: int = 3


FULL = Plan()
QUICK = Plan(
    quick=True,
    rounds=5,
    warmup=1,
    block_seconds=0.5,
    blocks=2,
    settle_seconds=0.2,
    idle_seconds=5.0,
    idle_containers=10,
    few=2,
    many=8,
    swings=1,
)

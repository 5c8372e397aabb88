"""From a symptom back to the operation that made it: the producer, not those that passed it on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recipefuzz.diagnose.watching import Event, Operand

UNNAMED = "a tensor that the model keeps"


@dataclass(frozen=True)
class Origin:
    """Where what is not finite began.

    Attributes:
        event: the operation that made it; None where it came into the step from outside.
        outside: then what it was: "x", "y", "parameter NAME", "buffer NAME" or another tensor that the model keeps.
        chain: the operations from there to the symptom, in their order.
    """

    event: Event | None
    outside: str
    chain: tuple[Event, ...]

    @property
    def is_models(self) -> bool:
        """Whether it came in with what the model keeps, not with the rows."""
        return self.event is None and self.outside.startswith(("parameter", "buffer", "attribute", UNNAMED))

    @property
    def place(self) -> Event | None:
        """The operation to look at: the one that made it, or the first that read what the model keeps."""
        return self.chain[0] if self.is_models else self.event


def origin_of(events: Sequence[Event], symptom: Iterable[int]) -> Origin | None:
    """The earliest beginning that is reached from the symptom by way of operands that were not finite then.

    Healthy steps hold values that are not finite, too; those from which no such way leads to the symptom don't matter.

    Args:
        symptom: operations that wrote the tensor that should be finite; without any there is nothing to follow.
    """
    start = tuple(symptom)
    if not start:
        return None
    came_from: dict[int, int | None] = dict.fromkeys(start)
    waiting = list(start)
    producers: list[int] = []
    leaves: list[tuple[str, int]] = []
    while waiting:
        index = waiting.pop()
        event = events[index]
        guilty = [o for o in event.operands if not o.stats.finite and (event.meant or not o.meant)]
        if not guilty:
            producers.append(index)
        for operand in guilty:
            if not operand.writers:
                leaves.append((_name(operand), index))
            for writer in operand.writers:
                if writer not in came_from:
                    came_from[writer] = index
                    waiting.append(writer)
    if leaves:  # before the step's first operation
        name, at = min(leaves, key=lambda leaf: leaf[1])
        return Origin(None, name, _chain(events, at, came_from))
    first = min(producers)
    return Origin(events[first], "", _chain(events, first, came_from))


def _name(operand: Operand) -> str:
    return operand.outside or UNNAMED


def _chain(events: Sequence[Event], start: int, came_from: dict[int, int | None]) -> tuple[Event, ...]:
    chain, at = [events[start]], came_from[start]
    while at is not None:
        chain.append(events[at])
        at = came_from[at]
    return tuple(chain)

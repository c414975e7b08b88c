"""Suite: extra peak memory of one attention call by length, and of a stack of calls by depth."""

from __future__ import annotations

from attention import MODES, attention_case
from cases import by_importance
from peers import PEERS, VARIANTS

DEPTHS = (2, 4, 8)


def cases(settings):
    lengths, peers = by_importance(settings.lengths), dict(PEERS)
    if settings.device.type == "cpu":
        # a process's peak would be that of its compiler
        del peers["FlexAttention window"]
    for length in lengths[: 1 if settings.quick else None]:
        for mode in MODES[settings.quick :]:
            yield attention_case(settings, peers if settings.quick else peers | VARIANTS, length, mode, measure="memory")
    middle = sorted(lengths)[(len(lengths) - 1) // 2]
    for depth in () if settings.quick else DEPTHS:
        yield attention_case(settings, peers, middle, MODES[1], depth=depth, measure="memory")

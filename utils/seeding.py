"""Seeds that are derived from where a run stands, never from a global state (docs/method.md, "Training")."""

from __future__ import annotations

import numpy as np


def derive_seed(*parts: int) -> int:
    """One seed in [0, 2**63) from whole numbers such as (seed, stage, loop, epoch, index).

    The same parts give the same seed on every platform and in every process; a change of one part, of their order or
    of their number gives an unrelated one. Parts may be negative; beyond 63 bits they raise a ValueError.
    """
    words = [len(parts)]
    for part in parts:
        if not -(2**63) <= part < 2**63:
            raise ValueError(f"a part of a seed must fit 64 bits, not {part}")
        unsigned = part % 2**64
        # Two words for each part: numpy alone takes 2**32 for (0, 1), and (1,) for (1, 0).
        words += [unsigned & 0xFFFFFFFF, unsigned >> 32]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1

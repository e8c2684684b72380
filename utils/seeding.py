"""Seeds derived from the position in a run, without a global random state (docs/method.md, "Training")."""

import numpy as np


def derive_seed(*parts: int) -> int:
    """Derive a seed from whole numbers such as (seed, stage, loop, epoch, index).

    The same parts give the same seed on every platform; another value, order or number of parts gives an unrelated one.

    Args:
        parts: Whole numbers of at most 63 bits and a sign.

    Returns:
        A seed in [0, 2**63).

    Raises:
        ValueError: A part is too large.
    """
    words = [len(parts)]
    for part in parts:
        if not -(2**63) <= part < 2**63:
            raise ValueError(f"a part of a seed must fit 64 bits, not {part}")
        unsigned = part % 2**64
        # Two words for each part: numpy alone gives 2**32 and (0, 1) the same seed, and (1,) and (1, 0).
        words += [unsigned & 0xFFFFFFFF, unsigned >> 32]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1

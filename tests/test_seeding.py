"""Seeds depend on all of their parts."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.seeding import derive_seed

PARTS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)


@given(PARTS)
def test_seeds_fit_63_bits(parts: list[int]) -> None:
    assert 0 <= derive_seed(*parts) < 2**63


@given(PARTS, PARTS)
def test_other_parts_give_another_seed(one: list[int], other: list[int]) -> None:
    assert (derive_seed(*one) == derive_seed(*other)) == (one == other)


@pytest.mark.parametrize(("one", "other"), [((1,), (1, 0)), ((2**32,), (0, 1)), ((), (0,)), ((-1,), (1,))])
def test_parts_that_numpy_does_not_distinguish(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert derive_seed(*one) != derive_seed(*other)


def test_seeds_are_the_same_in_every_process() -> None:
    command = [sys.executable, "-c", "from utils.seeding import derive_seed; print(derive_seed(3, 1, 4))"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    # A fixed value: another one would change the random numbers of resumed runs.
    assert int(output.stdout) == derive_seed(3, 1, 4) == 3495614088627438184


def test_parts_beyond_64_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        derive_seed(2**63)

"""CPU merge kernels for one map at a time, for maps that arrive one after another.

First, the ``mip`` maps of all partials determine the winner of each pixel. Each other map can then
be merged separately while it is in the cache, and is complete after its last partial. Results are
bit-identical to folding whole partials (:mod:`ocelot_em.kernels.reference`).

All arrays are C-contiguous and have the same size. Winners are partial numbers, int16, -1 where no
partial has searched. Functions that return a number report with a 1 that a value is NaN or infinite
(a ``mip`` may be -inf), or an index out of range.
"""

from typing import Any

import numpy as np

from ocelot_em.kernels.compiling import compiled, not_a_mip, not_finite
from ocelot_em.model.maps import NOT_SEARCHED


@compiled
def update_winner(new: Any, number: Any, first: Any, mip: Any, winner: Any) -> Any:
    """Update the winner where a partial's ``mip`` is higher; -inf and NaN never win.

    ``first``: old contents are ignored.
    """
    bad = np.int32(0)
    for i in range(mip.size):
        value, old, won_before = new[i], mip[i], winner[i]
        old = np.float32(-np.inf) if first else old
        won_before = np.int16(NOT_SEARCHED) if first else won_before
        won = value > old
        mip[i] = value if won else old
        winner[i] = number if won else won_before
        bad |= not_a_mip(value)
    return bad


@compiled
def update_winner_indexed(
    new: Any, new_index: Any, number: Any, first: Any, n_poses: Any, kept: Any
) -> Any:
    """Do the same as :func:`update_winner`; in a tie, the lower index wins.

    ``kept`` holds the ``mip``, the index and the winner.
    """
    mip, index, winner = kept
    bad = np.int32(0)
    for i in range(mip.size):
        value, old, won_before = new[i], mip[i], winner[i]
        candidate, old_index = new_index[i], index[i]
        old = np.float32(-np.inf) if first else old
        won_before = np.int16(NOT_SEARCHED) if first else won_before
        old_index = np.int32(NOT_SEARCHED) if first else old_index
        searched = value > -np.inf
        won = (value > old) | ((value == old) & (candidate < old_index) & searched)
        mip[i] = value if won else old
        index[i] = candidate if won else old_index
        winner[i] = number if won else won_before
        bad |= not_a_mip(value) | np.int32(
            (candidate < NOT_SEARCHED)
            | (candidate >= n_poses)
            | ((candidate == NOT_SEARCHED) & searched)
        )
    return bad


@compiled
def take(new: Any, number: Any, winner: Any, kept: Any) -> Any:
    """Copy a partial's values where it won."""
    bad = np.int32(0)
    for i in range(kept.size):
        value, old, won = new[i], kept[i], winner[i] == number
        kept[i] = value if won else old
        bad |= not_finite(value)
    return bad


@compiled
def any_not_finite(values: Any) -> Any:
    """Return whether any value is NaN or infinite."""
    bad = np.int32(0)
    for i in range(values.size):
        value = values[i]
        bad |= not_finite(value)
    return bad


@compiled
def count_unsearched(winner: Any) -> int:
    """Count pixels without a winner."""
    count = 0
    for i in range(winner.size):
        count += int(winner[i] < 0)
    return count


@compiled
def blank(winner: Any, kept: Any) -> None:
    """Set NaN where there is no winner."""
    for i in range(kept.size):
        old = kept[i]
        kept[i] = np.float32(np.nan) if winner[i] < 0 else old


@compiled
def number_winners(winner: Any, numbers: Any, best_partial: Any) -> None:
    """Look up the numbers of the winners; -1 where there is none."""
    for i in range(winner.size):
        won = winner[i]
        best_partial[i] = numbers[won] if won >= 0 else np.int32(NOT_SEARCHED)


@compiled
def take_number(new: Any, first: Any, number: Any, winner: Any, best_partial: Any) -> None:
    """Copy the numbers of a merged partial where it won, offset by ``first``."""
    for i in range(winner.size):
        value, old = new[i], best_partial[i]
        best_partial[i] = first + value if winner[i] == number else old


@compiled
def add(new: Any, first: Any, total: Any) -> Any:
    """Add in float64; ``first``: to 0, instead of the total."""
    bad = np.int32(0)
    for i in range(total.size):
        value, old = new[i], total[i]
        old = 0.0 if first else old
        total[i] = old + np.float64(value)  # -0.0 becomes 0.0
        bad |= not_finite(value)
    return bad

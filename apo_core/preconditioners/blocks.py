"""Cutting a side into blocks of one size, so that one batched product serves them all."""

from __future__ import annotations

from apo_core.preconditioners.preconditioner import require_count


def equal_blocks(total: int, block: int) -> tuple[int, int]:
    """(count, size) = (⌈total / block⌉, ⌈total / count⌉): the fewest blocks of at most `block`.

    All have one size, as near to each other as can be: count·size − total < count entries are left
    over, and all lie in the last block. Of nothing there is one block of size 0.

    Raises:
        ValueError: `block` is no integer of at least 1.
    """
    require_count("block", block, "the largest size of a block")
    count = max(1, -(-total // block))
    return count, -(-total // count)

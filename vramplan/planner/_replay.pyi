import numpy as np
from numpy.typing import NDArray

EDITION: int

def play(
    programs: tuple[NDArray[np.int64], ...], settled: int, n_blocks: int, large_segment_bytes: int, cap_bytes: int, /
) -> tuple[int, int, int] | None: ...

"""The learning rate of every step: warm-up, a constant rate, and a decay at the end of the run.

`config` has lr, schedule, decay_steps, min_lr_ratio and warmup_steps, see testv2.py.
"""

from __future__ import annotations

import math
from typing import Any


def warmup_length(total_steps: int, config: Any) -> int:
    """Steps of warm-up in a run that begins.

    With wsd and constant they do not depend on the length of the run, so that runs of different
    lengths are the same until they decay.
    """
    cut = config.schedule in ("cosine", "linear")
    return min(config.warmup_steps, total_steps // 10) if cut else config.warmup_steps


def learning_rate(step: int, total_steps: int, config: Any, warmup: int | None = None) -> float:
    """Linear warm-up to `lr`, then `lr`, then a decay to min_lr_ratio * lr at the last step.

    The decay is half a cosine wave, a straight line, or for wsd 1 - sqrt (Hagele et al., arXiv
    2405.18392, section 3). A resumed run gives the `warmup` that it began with.
    """
    warmup = warmup_length(total_steps, config) if warmup is None else warmup
    if step < warmup:
        return config.lr * (step + 1) / max(1, warmup)  # -1 is before the first step
    if config.schedule == "constant":
        return config.lr
    decay = config.decay_steps or (total_steps // 10 if config.schedule == "wsd" else total_steps)
    last = total_steps - 1
    begin = max(warmup, last - decay)
    progress = min(1.0, max(0, step - begin) / max(1, last - begin))
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "wsd": 1 - math.sqrt(progress),
    }[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)

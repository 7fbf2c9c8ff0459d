"""What a training run says of itself: at its start, after steps and after a validation.

`trainer` is the Trainer of testv2.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tinymamba.cli import require, show

GATE = ("ssm", "attention", "mlp", "entropy")


def describe_start(trainer: Any) -> Iterator[str]:
    """What is trained, where, on what, and for how long."""
    t, c, counts = trainer, trainer.config, trainer.model.count_parameters()
    parts = ", ".join(f"{name} {n:,}" for name, n in counts.items() if n and name != "total")
    yield f"{counts['total']:,} parameters: {parts}"
    yield f"{t.world} x {t.device}, {show(t.amp)}; logs in {t.folder}"
    if c.context_parallel > 1:
        yield f"{c.context_parallel} processes share each text"
    for data in (t.train_data, t.val_data):
        yield from data.describe() if getattr(data, "masked", False) else ()
    samples = t.samples + (t.total_steps - t.step) * t.samples_per_step
    epochs = t.first_epoch + (samples - t.first_sample) / len(t.train_data)
    steps = f"steps {t.step} to {t.total_steps}, {epochs:.2f} epochs in all"
    yield f"{steps}; a step is {t.tokens_per_step:,} tokens"
    yield from describe_rate(t)
    known = len(t.tokenizer) if hasattr(t.tokenizer, "__len__") else c.vocab_size
    if known < c.vocab_size // 2:
        yield f"hint: this data needs no more than --vocab_size {known}"


def describe_rate(trainer: Any) -> Iterator[str]:
    """Whether warm-up is short, or the learning rate is another than it was to be."""
    t, c, end = trainer, trainer.config, trainer.rate(trainer.total_steps - 1)
    if t.resumed and t.samples == t.first_sample > 0:
        yield "the training data have changed: a new epoch begins"
    if not t.resumed:
        if t.warmup < c.warmup_steps:
            yield f"warm-up: {t.warmup} steps, as this run is short"
        return
    total, last, planned = t.planned
    if (t.total_steps, t.rate(t.step)) != (total, planned):
        yield (
            f"the learning rate was {last:.2e} at step {t.step}, continues with "
            f"{t.rate(t.step):.2e}, and ends with {end:.2e} at step {t.total_steps}"
        )


def report_step(trainer: Any, loss: float, norm: float, seconds_per_step: float) -> None:
    """One line on the console, and the same numbers to the logs."""
    t = trainer
    (step, tokens), t.reported = t.reported, (t.step, t.tokens)
    speed = (t.tokens - tokens) / (t.step - step) / seconds_per_step
    rate = t.rate(t.step - 1)
    left = int((t.total_steps - t.step) * seconds_per_step)
    t.log.say(
        f"step {t.step}/{t.total_steps} | loss {loss:.4f} | lr {rate:.2e} | "
        f"grad norm {norm:.2f} | {speed:,.0f} tokens/s | "
        f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    )
    values = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_second": speed}
    values["skipped_steps"] = t.progress["skipped"]
    t.log.record({f"train/{name}": value for name, value in values.items()}, t.step)
    t.progress["history"]["train"].append([t.step, loss])


def check_gradient(trainer: Any, loss: float, norm: float) -> None:
    """Report a step that was skipped; end the run after max_bad_steps in a row."""
    t = trainer
    if not (bad := t.progress["bad_steps"]):
        return
    t.log.say(
        f"step {t.step}: gradient norm {norm}, loss {loss:.4f}; the weights do not change "
        f"({t.progress['skipped']} steps skipped so far)"
    )
    problem = f"{bad} steps in a row had no finite gradient"
    remedy = "lower it, or look at the data; the last checkpoint is intact"
    require(bad < t.config.max_bad_steps, "lr", problem, remedy)


def report_validation(trainer: Any, loss: float, gates: dict[str, float]) -> float:
    """One line on the console, and the same numbers to the logs; returns the loss."""
    t, values = trainer, {**gates, "val/loss": loss}
    line = f"validation at step {t.step}: {loss:.4f} nats"
    if t.bytes_per_token:
        values["val/bits_per_byte"] = loss / math.log(2) / t.bytes_per_token
        line += f", {values['val/bits_per_byte']:.4f} bits per byte"
    if t.main:
        line += " | gate " + " ".join(f"{n} {values[f'gate/{n}']:.2f}" for n in GATE)
    t.log.say(line)
    t.log.record(values, t.step)
    t.progress["history"]["val"].append([t.step, loss])
    return loss

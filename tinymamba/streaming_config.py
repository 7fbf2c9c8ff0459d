"""The settings of an answer, which streaming.py and the sites of export_model.py share."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from tinymamba.cli import check_fields, has_type, require
from tinymamba.structured import read_form

RECENT = 512  # last tokens a session keeps, for the repetition penalty


@dataclass
class StreamingConfig:
    """How to generate. Every method that generates also takes these fields as keywords."""

    max_new_tokens: int = 100  # maximum tokens of an answer; 0 only reads the prompt
    temperature: float = 0.8  # 0 always takes the most likely token
    top_k: int = 50  # sample from this many of the most likely tokens; 0 means all
    top_p: float = 1.0  # sample from the fewest tokens whose probabilities reach this sum
    min_p: float = 0.0  # drop tokens with less than this fraction of the highest probability
    repetition_penalty: float = 1.0  # above 1, tokens in the window become less likely
    repetition_window: int = 64  # last tokens, prompt included, that this penalty applies to
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that the answer has
    frequency_penalty: float = 0.0  # the same, once for each time that the answer has the token
    logit_bias: dict[int, float] | None = None  # added to the logits of these ids; -inf bans one
    stop: list[str] | None = None  # strings that end an answer; they are not part of it
    stop_ids: list[int] | None = None  # ids that end an answer, besides eos_token_id
    structured_outputs: dict[str, Any] | None = None  # {"json": schema} or regex, choice, grammar
    seed: int | None = None  # random seed of the answer; None takes the session's
    logprobs: int | None = None  # list this many alternatives with every token
    prompt_logprobs: int | None = None  # the same for the prompt's tokens, in Answer.scores
    adapter: str | None = None  # name of one of the server's adapters; None uses none
    reset_on_eos: bool = False  # clear the session after an answer that ends with eos
    eos_token_id: int | None = None  # None takes the model's or the tokenizer's; -1 means none
    bos_token_id: int | None = None  # first token of a session; None: eos, if the prompt is empty
    pad_token_id: int | None = None  # is never sampled
    batch_size: int = 64  # maximum answers decoded together; set for a whole server
    state_buffer_size: int = 8  # maximum tokens generated ahead of a slow reader
    optimize_memory: bool = False  # read prompts 512 tokens at a time, not 4,096

    LIMITS: ClassVar = {
        **dict.fromkeys(("max_new_tokens", "temperature", "top_k"), (0, math.inf)),
        **dict.fromkeys(("batch_size", "state_buffer_size"), (1, math.inf)),
        **dict.fromkeys(("top_p", "min_p"), (0, 1)),
        "repetition_penalty": (1e-3, 1e3),
        "repetition_window": (0, RECENT),
        **dict.fromkeys(("presence_penalty", "frequency_penalty"), (-2, 2)),
        "seed": (0, 2**63 - 1),
    }

    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    def validate(self, vocab_size: int) -> StreamingConfig:
        """Reject wrong types and impossible values with a UserError; return self."""
        limits: dict = dict.fromkeys(("logprobs", "prompt_logprobs"), (0, vocab_size))
        limits |= dict.fromkeys(("bos_token_id", "pad_token_id"), (0, vocab_size - 1))
        limits |= {"eos_token_id": (-1, vocab_size - 1)}
        empty = [name for name in ("stop", "stop_ids") if getattr(self, name) == []]
        nones: dict = dict.fromkeys(empty)  # check_fields rejects empty lists
        check_fields(dataclasses.replace(self, **nones), limits)
        require("" not in (self.stop or []), "stop", "has an empty string", "remove it")
        bias = self.logit_bias or {}
        numbers = all(has_type(b, float) or b == -math.inf for b in bias.values())
        remedy = "pass {id: number}; -inf bans an id"
        require(numbers, "logit_bias", f"{bias!r} is invalid", remedy)
        for name, ids in (("stop_ids", self.stop_ids or []), ("logit_bias", bias)):
            known = all(type(i) is int and 0 <= i < vocab_size for i in ids)
            remedy = f"ids are whole numbers from 0 to {vocab_size - 1}"
            require(known, name, f"{[*ids]} are not all ids", remedy)
        if self.structured_outputs is not None:
            read_form(self.structured_outputs)
        return self

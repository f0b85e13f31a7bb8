"""A language model that rewrites the prompt: by one instruction, or shown its earlier rewrites with their scores.

`single` is the baseline of arXiv 2503.21812 (a concise rewrite of the sentence that makes its image better by the
reward), asked again and again; `history` is a loop in the manner of OPT2I (Mañas et al., arXiv 2403.17804).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ipgo_opt.errors import BadInput
from ipgo_opt.llm import CallsSpent, Chat
from ipgo_opt.strategies.base import Exhausted, Problem
from ipgo_opt.strategies.rewriting import Rewriting

MODES = ("single", "history")

SINGLE = """Rewrite the sentence below, concisely, so that the image a text-to-image model makes of it is {goal}.
Keep what the sentence describes. Answer with the rewritten sentence and nothing else.
Sentence: {prompt}"""

HISTORY = """A text-to-image model draws prompts, and each image is scored by how well it shows the sentence "{prompt}".
The image should become {goal}. These are prompts that were tried, with their scores; larger is better.

{tried}

Write {count} new prompts that keep what the sentence describes and that you expect to score higher than all of these.
Vary what the good ones have in common. Answer with the prompts and nothing else, one on each line."""

SHOWN = 20
"""Most earlier prompts that the model is shown, the best ones."""

PER_CALL = 5
"""New prompts that are asked for at a time with `history`."""

LONGEST = 1000
"""Characters of a prompt; longer lines are something else."""

ATTEMPTS = 3
"""Answers in a row without a prompt after which the run fails."""

MARK = re.compile(r"^(?:\d+\s*[.):]|[-*•])\s*")
"""What stands before the items of a list."""


@dataclass(frozen=True)
class LlmOptions:
    """What the model is told.

    Attributes:
        mode: one of MODES.
        goal: what the image should become.
        prompt: the raw prompt.

    """

    mode: str
    goal: str
    prompt: str

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BadInput(f"llm_mode must be one of {', '.join(MODES)}, but got {self.mode!r}.")


def prompts_in(answer: str) -> list[str]:
    """The prompts of an answer, one per line, without numbers, bullets and quotes."""
    lines = (MARK.sub("", line.strip()).strip().strip("\"'“”`").strip() for line in answer.splitlines())
    return [line for line in lines if line and len(line) <= LONGEST and any(c.isalnum() for c in line)]


class Llm(Rewriting):
    """Rewrites by a language model.

    Args:
        problem: of one coordinate, the number of a text.
        texts: the list that is shared with the space.
        chat: the model.
        options: what it is told.

    """

    def __init__(self, problem: Problem, texts: list[str], chat: Chat, options: LlmOptions) -> None:
        super().__init__(problem, texts)
        self.chat, self.options = chat, options

    def write(self) -> list[str]:
        """What the model answers; Exhausted when it may not be asked again."""
        attempt = 1
        while True:
            try:
                answer = self.chat.ask([{"role": "user", "content": self.message()}])
            except CallsSpent as spent:
                raise Exhausted(f"{str(spent)[:1].upper()}{str(spent)[1:]}") from None
            found = prompts_in(answer)
            if found:
                return found[:1] if self.options.mode == "single" else found[:PER_CALL]
            if attempt == ATTEMPTS:
                raise self.chat.failed(f"gave no prompt in {attempt} answers; the last was", answer)
            attempt += 1

    def message(self) -> str:
        """What the model is asked now."""
        if self.options.mode == "single":
            return SINGLE.format(goal=self.options.goal, prompt=self.options.prompt)
        tried = "\n".join(f"{value:.4f}: {text}" for value, text in self.ranked()[-SHOWN:])
        return HISTORY.format(
            goal=self.options.goal, prompt=self.options.prompt, count=PER_CALL, tried=tried or "(none yet)"
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The search, and how often the model was asked."""
        return super().state_dict() | {"calls": self.chat.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        super().load_state_dict(state)
        self.chat.calls = state["calls"]

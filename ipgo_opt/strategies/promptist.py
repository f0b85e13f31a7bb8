"""Promptist (Hao et al., NeurIPS 2023): a causal language model that was tuned to rephrase prompts.

Its settings: the prompt in a template, a beam search of 8 for up to 75 new tokens with length penalty −1. The beams are
tried in order; when they are used up, further rewrites are drawn at temperature 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.strategies.base import Problem
from ipgo_opt.strategies.rewriting import Rewriting

BEAMS, NEW_TOKENS, LENGTH_PENALTY = 8, 75, -1.0

EMBEDDED = {"emoji": Path(__file__).parent / "emoji"}
"""Models inside the package, by name: a GPT-2 of three layers for the embedded world (`training/promptist.py`)."""

PUBLISHED = {"microsoft/Promptist": "0.5 GB"}
"""Sizes of weights, for people."""


@dataclass(frozen=True)
class PromptistOptions:
    """Which model rephrases.

    Attributes:
        model: one of EMBEDDED, or a folder or a hub id of a transformers causal language model with safetensors
            weights.
        template: what it is given, with {prompt} in it.
        remote_code: whether code that the model brings may run.

    """

    model: str
    template: str = "{prompt} Rephrase:"
    remote_code: bool = False


def find_model(model: str, template: str) -> Path:
    """The folder of the model, or of its files in the hub's cache; BadInput if they are missing. Loads nothing."""
    if "{prompt}" not in template:
        raise BadInput(f"promptist_template must hold {{prompt}}, but got {template!r}.")
    folder = EMBEDDED.get(model, Path(model).expanduser())
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(model, "config.json")
        except HFValidationError:
            raise BadInput(f"promptist must be a folder or a hub id of a language model, but got {model!r}.") from None
        if not isinstance(found, str):
            raise BadInput(
                f"the language model {model!r} ({PUBLISHED.get(model, 'size as its page says')}) is not in "
                f"{HF_HUB_CACHE}; get it with: hf download {model}"
            )
        folder = Path(found).parent
    if not (folder / "config.json").is_file():
        raise BadInput(f"the folder of a language model must hold config.json, but {str(folder)!r} does not.")
    if not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"a language model must have safetensors weights (other formats can hold code that runs), but "
            f"{str(folder)!r} has none; load it where you trust it and save it with save_pretrained."
        )
    return folder


@functools.lru_cache(maxsize=1)
def load(folder: Path, remote_code: bool) -> tuple[Any, Any]:
    """The tokenizer and the model, in float32 on the CPU, loaded once for all prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), use_safetensors=True, trust_remote_code=remote_code, dtype=torch.float32
        )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RunFailed(f"the language model in {str(folder)!r} did not load: {reason[0]}") from error
    return tokenizer, model.eval()


class Promptist(Rewriting):
    """Rewrites by a local language model.

    Args:
        problem: of one coordinate, the number of a text.
        texts: the list that is shared with the space; the model is given its first text.
        options: which model.

    """

    def __init__(self, problem: Problem, texts: list[str], options: PromptistOptions) -> None:
        super().__init__(problem, texts)
        self.options = options
        self.folder = find_model(options.model, options.template)
        self.written = 0

    def write(self) -> list[str]:
        """The beams the first time, draws after that."""
        beams = self.written == 0
        self.written += 1
        tokenizer, model = load(self.folder, self.options.remote_code)
        given = tokenizer(self.options.template.format(prompt=self.texts[0].strip()), return_tensors="pt")
        end = tokenizer.eos_token_id
        how: dict[str, Any] = (
            {"do_sample": False, "num_beams": BEAMS, "length_penalty": LENGTH_PENALTY}
            if beams
            else {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0}
        )
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
            torch.manual_seed(self.problem.seed + self.written)
            made = model.generate(
                **given,
                max_new_tokens=NEW_TOKENS,
                num_return_sequences=BEAMS,
                eos_token_id=end,
                pad_token_id=end,
                **how,
            )
        texts = tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        return [line for text in texts if (line := " ".join(text.split()))]

    def state_dict(self) -> dict[str, Any]:
        """The search, and how often the model has written."""
        return super().state_dict() | {"written": self.written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        super().load_state_dict(state)
        self.written = state["written"]

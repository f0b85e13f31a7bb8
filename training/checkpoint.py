"""What every training stage needs of the disk: where it lives, resuming, and a log of what was run."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORK = Path(os.environ.get("EMOJI_WORK", Path(__file__).parent / "work"))
"""Where stages leave their results for one another."""


def cosine(steps: int, warmup: int = 50, flat: float = 0.0, floor: float = 0.02) -> Callable[[int], float]:
    """The learning rate's factor at each step: a short rise, `flat` (share of `steps`) at 1, a cosine to `floor`."""

    def factor(step: int) -> float:
        fall = min(1.0, max(0.0, (step / steps - flat) / (1 - flat)))
        return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * (1 + math.cos(math.pi * fall)) / 2)

    return factor


class Progress:
    """A stage's checkpoint file and loss log.

    `parts` are objects with `state_dict`/`load_state_dict`; they are restored on construction when a checkpoint is
    there. The file is replaced atomically, so a stage may be killed at any time.
    """

    def __init__(self, name: str, every: int = 50, **parts: Any) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        self.path, self.log = WORK / f"{name}.ckpt.pt", WORK / f"{name}.log.jsonl"
        self.every, self.parts, self.step = every, parts, 0
        self.started, self.losses = time.time(), list[float]()
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.step = state.pop("step")
            for key, part in parts.items():
                part.load_state_dict(state[key])
            print(f"{name}: continues at step {self.step}", flush=True)

    def tick(self, loss: float, *, save: bool = True) -> None:
        """Counts one finished step; writes the checkpoint and a log line now and then (one process of several)."""
        self.step += 1
        self.losses.append(loss)
        if save and self.step % self.every == 0:
            self.save()

    def save(self) -> None:
        """Writes checkpoint and log line."""
        state = {"step": self.step} | {key: part.state_dict() for key, part in self.parts.items()}
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)
        if self.losses:
            mean = sum(self.losses) / len(self.losses)
            line = {"step": self.step, "loss": round(mean, 5), "seconds": round(time.time() - self.started, 1)}
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
            self.losses.clear()

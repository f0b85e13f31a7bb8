"""Learned tokens on new prompts: raw beside optimized, at one strength or several."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.artefact import ConditioningFile, load_conditioning
from ipgo_opt.comparison import interval
from ipgo_opt.conditioning import Conditioning
from ipgo_opt.config import MOST_STRENGTH, RunConfig, check, configure
from ipgo_opt.errors import BadInput
from ipgo_opt.grid import grid
from ipgo_opt.loop import finite
from ipgo_opt.objective import Evaluation, Objective, Request
from ipgo_opt.rewards.base import shown
from ipgo_opt.run import Parts, assemble
from ipgo_opt.spaces import SPACES
from ipgo_opt.spaces.tokens import inserted
from ipgo_opt.store import read_run, read_tensors, slug, to_pil, write_whole
from ipgo_opt.strategies import STRATEGIES


class Nothing:
    """The reward of who asks for none: 0 for every image."""

    differentiable = False
    spec = "object:nothing"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Zeros (B,)."""
        return torch.zeros(len(images))


class Strengths:
    """Fixed tokens as a space with one coordinate: the factor on what is inserted."""

    needs_noise = False

    def __init__(self, file: ConditioningFile) -> None:
        self.tokens, self.how = file.tokens, {"attend": file.attend, "anchor": file.anchor}

    def apply(self, x: Tensor, conditioning: Conditioning, *, full: bool) -> tuple[Conditioning, Tensor]:
        """The tokens at q strengths x (q, 1) around B prompts, and no penalty."""
        rows = conditioning.expand(len(x))
        tokens = {name: V.expand(len(x), -1, -1) for name, V in self.tokens.items()}
        return inserted(tokens, rows, strength=x[:, 0], **self.how), torch.zeros(len(rows))


class Point:
    """The point that a run of another space found; it has no strength but 1."""

    def __init__(self, space: Any, x: Tensor, full: bool) -> None:
        self.space, self.x, self.full = space, x, full
        self.needs_noise = space.needs_noise

    def apply(self, x: Tensor, conditioning: Conditioning, *, full: bool) -> tuple[Conditioning, Tensor]:
        """The point's inputs for B prompts."""
        if not bool((x == 1).all()):
            raise BadInput(
                f"only tokens have a strength; what this run found has none but 1, but got {x[:, 0].tolist()}."
            )
        changed: tuple[Conditioning, Tensor] = self.space.apply(self.x[None], conditioning, full=self.full)
        return changed


def check_strengths(strengths: Sequence[float]) -> None:
    """Raises BadInput unless there is one at least and all are from 0 to 1.5."""
    for value in strengths or [math.nan]:
        if not 0 <= value <= MOST_STRENGTH:
            raise BadInput(f"`0 <= strength <= {MOST_STRENGTH}` must hold, but got strength={value}.")


def apply(
    source: str | Path,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    strengths: Sequence[float] = (1.0,),
    reward: str | None = None,
    judge: str | None = None,
    model: str | None = None,
    out: str | Path | None = None,
    picture: bool = False,
    loaded: dict[Any, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Makes images of prompts without and with what a run has learned.

    Args:
        source: a run directory or its conditioning file.
        prompts: what the images should show.
        seeds: of the noise: every prompt on each.
        strengths: factors on the inserted tokens, 0 to 1.5 (at 0, tokens of zeros, or the
            anchors, are still there to be attended to).
        reward: what scores the images; None for nothing.
        judge: a second opinion; None for none.
        model: another copy of the model that the tokens were learned on.
        out: where the images are written, and apply.json; None to write nothing.
        picture: whether grid.png is written as well: a row for each prompt and seed, raw first.
        loaded: as in `optimize`.
        progress: is told the number of images after every batch.

    Returns:
        `images` (one entry each: prompt, seed, strength (None for raw), reward, judge, file), and for every strength
        `differences` of reward and judge to raw, with 95 % bootstrap intervals over the prompts.

    Raises:
        BadInput: the file is none, was made for another model, a strength or seed is out of range.

    """
    check_strengths(strengths)
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise BadInput(f"prompts must not be empty, but got {list(prompts)!r}.")
    if not seeds or min(seeds) < 0:
        raise BadInput(f"`seed >= 0` must hold for one seed at least, but got {list(seeds)}.")
    file = load_conditioning(source)
    config = _config(Path(source), file, prompts[0], reward, judge, model)
    parts = assemble(config, None if reward else Nothing(), {} if loaded is None else loaded)
    file.check_encoder(parts.sampler)
    space = _learned(Path(source), file, parts)
    objective = Objective(config, parts.sampler, parts.reward, parts.judge, space, full=False)
    own = tuple(tuple(seeds) for _ in prompts)
    x = torch.tensor(strengths, dtype=torch.float32)[:, None]
    keep = out is not None
    requests = [Request(None, tuple(prompts), own, images=keep), Request(x, tuple(prompts), own, images=keep)]
    raw, made = objective(requests, progress)
    result = _result(prompts, seeds, strengths, raw, made, reward is not None)
    result = {"source": str(source), "model": config.model, "reward": reward and shown(reward), "judge": judge} | result
    if out is not None:
        _write(Path(out), result, raw, made, picture)
    return result


def _config(
    source: Path, file: ConditioningFile, prompt: str, reward: str | None, judge: str | None, model: str | None
) -> RunConfig:
    """The settings that the images are made with: those of the run, or what the file says."""
    asked: dict[str, Any] = {"judge": judge or "none", "reward": reward or Nothing.spec, "strategy": "random"}
    if source.is_dir():
        own = RunConfig(**read_run(source)["config"])
        if SPACES.load(own.space).one_prompt:
            raise BadInput(f"what a run on the space {own.space!r} found is for its own prompt, {own.prompt!r}.")
        config = dataclasses.replace(own, prompt=prompt, model=model or own.model, basis="random", **asked)
        check(dataclasses.replace(config, space="tokens"))  # nothing is searched, so that any reward will do
        return config
    about = file.metadata
    try:
        return configure(
            prompt, model=model or about["model"], revision=about["revision"], scheduler=about["scheduler"],
            negative_prompt=about["negative_prompt"], num_inference_steps=int(about["num_inference_steps"]),
            guidance_scale=float(about["guidance_scale"]), true_cfg_scale=float(about.get("true_cfg_scale", 1.0)),
            height=int(about["height"]), width=int(about["width"]), **asked,
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{str(file.path)!r} does not say how its image was made: {error}.") from None


def _learned(source: Path, file: ConditioningFile, parts: Parts) -> Any:
    """What is applied: the file's tokens, or the point of a run on another space."""
    if not source.is_dir() or file.metadata.get("space", "tokens") == "tokens":
        return Strengths(file)
    if "x" not in file.tensors:
        raise BadInput(f"the run in {str(source)!r} found nothing better than the raw prompt.")
    parts.space.load_state_dict(read_tensors(source / "space.safetensors")[0])
    strategy = STRATEGIES.load(read_run(source)["config"]["strategy"])
    return Point(parts.space, file.tensors["x"], strategy.uses_gradient)


def _result(
    prompts: Sequence[str], seeds: Sequence[int], strengths: Sequence[float], raw: Evaluation, made: Evaluation,
    scored: bool,
) -> dict[str, Any]:  # fmt: skip
    """One entry for each image, raw first, and the differences to raw."""
    images, differences = [], []
    for strength, side, k in ((None, raw, 0), *((s, made, k) for k, s in enumerate(strengths))):
        for n, (prompt, seed) in enumerate(product(prompts, seeds)):
            images.append({
                "prompt": prompt, "seed": seed, "strength": strength,
                "reward": finite(side.scores[k, n]) if scored else None,
                "judge": None if side.judge is None else finite(side.judge[k, n]),
            })  # fmt: skip
    for k, strength in enumerate(strengths):
        entry: dict[str, Any] = {"strength": strength}
        if scored:
            entry["reward"] = _difference(raw.scores[0], made.scores[k], len(prompts))
        if raw.judge is not None and made.judge is not None:
            entry["judge"] = _difference(raw.judge[0], made.judge[k], len(prompts))
        differences.append(entry)
    return {"images": images, "differences": differences}


def _difference(raw: Tensor, made: Tensor, prompts: int) -> dict[str, Any]:
    """Means of both, and the paired difference with its interval over prompts (over seeds, for one prompt)."""
    gaps = (made - raw).view(prompts, -1)
    each = gaps.mean(1) if prompts > 1 else gaps[0]
    return {"raw": finite(raw.mean()), "mean": finite(made.mean()), "difference": interval(each.tolist())}


def _write(out: Path, result: dict[str, Any], raw: Evaluation, made: Evaluation, picture: bool) -> None:
    """A PNG for each image, apply.json and the grid."""
    assert raw.images is not None
    assert made.images is not None
    out.mkdir(parents=True, exist_ok=True)
    tiles = [to_pil(image) for image in torch.cat([raw.images, made.images])]
    for entry, tile in zip(result["images"], tiles, strict=True):
        side = "raw" if entry["strength"] is None else f"x{entry['strength']:g}"
        number = list(dict.fromkeys(one["prompt"] for one in result["images"])).index(entry["prompt"])
        entry["file"] = f"{number:03d}-{slug(entry['prompt'])}-{entry['seed']}-{side}.png"
        tile.save(out / entry["file"])
    if picture:
        columns = ["raw", *(f"strength {one['strength']:g}" for one in result["differences"])]
        rows = len(raw.images)
        labels = [f"{entry['prompt']}, seed {entry['seed']}" for entry in result["images"][:rows]]
        table = [[tiles[column * rows + row] for column in range(len(columns))] for row in range(rows)]
        grid(table, columns, labels).save(out / "grid.png")
    write_whole(out / "apply.json", (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())

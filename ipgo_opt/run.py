"""The run: ask, evaluate, tell, record, checkpoint. The only place where space, sampler, reward and strategy meet."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ipgo_opt import __version__
from ipgo_opt.conditioning import Conditioning
from ipgo_opt.config import FIRST_HELD_OUT_SEED, RunConfig, check, check_device, configure
from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.models import load, resolve
from ipgo_opt.rewards import JUDGES, REWARDS
from ipgo_opt.rewards.base import Reward, Term, WeightedSum, parse
from ipgo_opt.spaces import SPACES
from ipgo_opt.store import FORMAT, Store, check_out, read_run, to_pil
from ipgo_opt.strategies import STRATEGIES
from ipgo_opt.strategies.base import Problem, Strategy

if TYPE_CHECKING:
    from PIL.Image import Image

    from ipgo_opt.models.sampler import Sampler

MOST_FAILURES = 10
"""Evaluations in a row without a finite reward after which a run gives up."""


class Reporter(Protocol):
    """Is told what happens; the command line's display is one."""

    def started(self, config: RunConfig, out: Path, history: list[dict[str, Any]]) -> None:
        """The search begins or goes on after `history`."""
        ...

    def evaluated(self, record: dict[str, Any]) -> None:
        """An image was scored."""
        ...

    def judging(self, done: int, total: int) -> None:
        """`done` of `total` images of the verdict are made."""
        ...

    def warned(self, message: str) -> None:
        """Something that the user should know and that does not stop the run."""
        ...

    def finished(self, summary: dict[str, Any]) -> None:
        """The run is over."""
        ...


class Silence:
    """A reporter that says nothing."""

    def started(self, config: RunConfig, out: Path, history: list[dict[str, Any]]) -> None:
        """Nothing."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def judging(self, done: int, total: int) -> None:
        """Nothing."""

    def warned(self, message: str) -> None:
        """Nothing."""

    def finished(self, summary: dict[str, Any]) -> None:
        """Nothing."""


@dataclass
class Result:
    """What a run found.

    Attributes:
        summary: the object that `--json` prints.
        history: one record per evaluated image.
        folder: the run directory (a temporary one if no `out` was given: see `save`).

    """

    summary: dict[str, Any]
    history: list[dict[str, Any]]
    folder: Path
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @cached_property
    def image(self) -> Image:
        """The best image, on the first search seed."""
        return self._open("best.png")

    @cached_property
    def raw_image(self) -> Image:
        """The raw prompt's image on the same seed."""
        return self._open("raw.png")

    def _open(self, name: str) -> Image:
        from PIL import Image

        with Image.open(self.folder / name) as image:
            return image.copy()

    @property
    def reward(self) -> float:
        """Best search reward: mean over the search seeds."""
        return float(self.summary["search_reward"])

    @property
    def raw_reward(self) -> float:
        """Reward of the raw prompt on the search seeds."""
        raw = self.summary["raw_reward"]
        return math.nan if raw is None else float(raw)

    @property
    def held_out(self) -> dict[str, Any] | None:
        """n, mean, sd, raw_mean, raw_sd of the reward on fresh seeds, or None if that was skipped."""
        held_out: dict[str, Any] | None = self.summary["held_out"]
        return held_out

    def save(self, folder: str | Path) -> Path:
        """Copies the run directory to `folder`, which must not hold a run yet, and is at home there from then on."""
        target = Path(folder)
        check_out(target)
        shutil.copytree(self.folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        self.folder, self.summary = target, self.summary | {"out": str(target)}
        store = Store(target)
        try:
            store.write_json("run.json", read_run(target) | {"result": self.summary})
        finally:
            store.close()
            (target / ".lock").unlink()
        return target


def optimize(
    prompt: str,
    *,
    reward: str | Reward | None = None,
    strategy: str = "gradient",
    space: str = "tokens",
    model: str = "emoji",
    budget: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Result:
    """Finds a better image for a prompt without touching the model.

    Args:
        prompt: what the image should show.
        reward: a name, a weighted sum ("clip+0.2*aesthetic"), or an object with the Reward contract; larger is better.
        strategy: who searches, as `ipgo-opt list` names it.
        space: what is searched, likewise.
        model: a name, a diffusers folder or a hub id.
        budget: images that the search may generate, the raw one included.
        seed: of the noise, the space and the strategy.
        out: the run directory; without it the run lives in a temporary one until `Result.save`.
        reporter: is told what happens.
        settings: any other field of RunConfig.

    Raises:
        BadInput: a setting breaks a rule; nothing was written.
        RunFailed: the run could not go on; `resume` may.

    """
    custom = None if reward is None or isinstance(reward, str) else reward
    if isinstance(reward, str) and reward.startswith("object:"):
        raise BadInput(f"reward must be a name or a weighted sum, but got {reward!r}.")
    if custom is not None and not hasattr(custom, "differentiable"):
        raise BadInput(f"a reward object must say whether it is `differentiable`, but {custom!r} does not.")
    if custom is not None:
        reward = f"object:{type(custom).__name__}"
    config = configure(
        prompt, reward=reward, strategy=strategy, space=space, model=model, budget=budget, seed=seed, **settings
    )
    temporary = tempfile.TemporaryDirectory(prefix="ipgo-opt-") if out is None else None
    folder = Path(out) if out is not None else Path(temporary.name)  # type: ignore[union-attr]
    check_out(folder)
    parts = _prepare(config, custom)
    store = Store(folder)
    try:
        store.write_json("run.json", _run_json(config, "running"))
        return _execute(config, store, reporter or Silence(), parts, temporary)
    finally:
        store.close()


def resume(folder: str | Path, *, reward: Reward | None = None, reporter: Reporter | None = None) -> Result:
    """Continues a run that was stopped; on the CPU it ends as if it never had been.

    Args:
        folder: the run directory.
        reward: the reward object again, if the run was started with one.
        reporter: is told what happens.

    """
    run = read_run(Path(folder))
    try:
        config = RunConfig(**run["config"])
    except (TypeError, KeyError) as error:
        raise BadInput(f"run.json in {str(folder)!r} has no usable configuration: {error}") from None
    if run["status"] == "finished":
        return Result(run["result"], _history(Path(folder)), Path(folder))
    if config.reward.startswith("object:") and reward is None:
        raise BadInput(f"the run was started with the reward object {config.reward[7:]}; pass it to resume.")
    check(config)
    store = Store(Path(folder))
    try:
        return _execute(config, store, reporter or Silence(), _prepare(config, reward))
    finally:
        store.close()


def _history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def _run_json(config: RunConfig, status: str, result: dict[str, Any] | None = None) -> dict[str, Any]:
    packages = ("torch", "diffusers", "transformers")
    return {
        "format": FORMAT,
        "ipgo_opt": __version__,
        "status": status,
        "config": dataclasses.asdict(config),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "result": result,
    }


@dataclass
class Evaluation:
    """Images and scores of q candidates on S seeds.

    `images` (q·S, 3, H, W); `scores` (q, S) and each of `parts`, `judge` likewise; `value` (q,) what the solver
    maximizes; `gradient` (q, D) of it, if asked for.
    """

    images: Tensor
    scores: Tensor
    parts: dict[str, Tensor]
    judge: Tensor | None
    penalty: Tensor
    value: Tensor
    gradient: Tensor | None


class Objective:
    """Points in, images and scores out: `value = mean reward over the seeds − γ · penalty`, equation (12).

    Args:
        config: the run's configuration.
        sampler: makes the images.
        reward: scores them.
        judge: a second opinion, or None.
        space: turns points into conditionings.
        full: which view of the space the points belong to.

    """

    def __init__(
        self, config: RunConfig, sampler: Sampler, reward: WeightedSum, judge: Reward | None, space: Any, full: bool
    ) -> None:
        self.config, self.sampler, self.reward, self.judge = config, sampler, reward, judge
        self.space, self.full = space, full
        self.conditioning = sampler.encode(config.prompt)

    def applied(self, x: Tensor | None) -> tuple[Conditioning, Tensor]:
        """Conditioning and penalty (q,) of points x (q, D); None is the raw prompt."""
        if x is None:
            return self.conditioning, torch.zeros(1)
        conditioning, penalty = self.space.apply(x, self.conditioning, full=self.full)
        return conditioning, penalty

    def __call__(self, x: Tensor | None, seeds: list[int], *, gradient: bool = False) -> Evaluation:
        """Evaluates points x (q, D), or the raw prompt, on every seed."""
        leaf = x.detach().clone().requires_grad_() if gradient and x is not None else x
        with torch.set_grad_enabled(gradient):
            conditioning, penalty = self.applied(leaf)
            q = len(conditioning)
            images = self.sampler.generate(conditioning.repeat(len(seeds)), seeds * q, gradient=gradient)
            prompts = [self.config.prompt] * len(images)
            parts = self.reward.parts(images, prompts)
            scores = self.reward.total(parts).view(q, len(seeds))
            value = scores.mean(1) - self.config.gamma * penalty.to(scores)
        slope = None
        if gradient and leaf is not None:
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        with torch.no_grad():
            judged = None if self.judge is None else self.judge(images.detach(), prompts).view(q, -1).cpu()
        return Evaluation(
            images.detach(),
            scores.detach().float().cpu(),
            {name: part.detach().float().view(q, -1).cpu() for name, part in parts.items()},
            judged,
            penalty.detach().float().cpu(),
            value.detach().float().cpu(),
            slope,
        )


class _Loop:
    """State of the search: what a checkpoint holds, and the files that go with it."""

    def __init__(self, config: RunConfig, store: Store, reporter: Reporter, objective: Objective) -> None:
        self.config, self.store, self.reporter, self.objective = config, store, reporter, objective
        self.seeds = list(range(config.seed, config.seed + config.search_seeds))
        self.history: list[dict[str, Any]] = []
        self.evaluation = self.failures = 0
        self.seconds = 0.0
        self.raw = self.best = -math.inf
        self.worst = math.inf
        self.best_x: Tensor | None = None  # None is the raw prompt
        self.started = time.monotonic()

    def record(self, x: Tensor | None, made: Evaluation) -> None:
        """Writes an evaluation to the history and keeps the best candidate."""
        seconds = round(self.seconds + time.monotonic() - self.started, 3)
        records: list[dict[str, Any]] = []
        for k in range(len(made.scores)):
            reward = float(made.scores[k].mean())
            finite = math.isfinite(reward)
            if finite and reward > self.best:
                self.best, self.best_x = reward, None if x is None else x[k].clone()
                self.store.write_image("best.png", made.images[k * len(self.seeds)])
            for s, seed in enumerate(self.seeds):
                score = float(made.scores[k, s])
                entry = {
                    "image": len(self.history) + len(records),
                    "evaluation": self.evaluation,
                    "candidate": k,
                    "seed": seed,
                    "reward": score if math.isfinite(score) else None,
                    "parts": {name: _finite(part[k, s]) for name, part in made.parts.items()},
                    "judge": None if made.judge is None else _finite(made.judge[k, s]),
                    "penalty": _finite(made.penalty[k]),
                    "best": _finite(self.best),
                    "seconds": seconds,
                }
                records.append(entry)
        self.failures = 0 if bool(made.scores.mean(1).isfinite().any()) else self.failures + 1
        self.history += records
        self.evaluation += 1
        self.store.append_history(records)
        for entry in records:
            self.reporter.evaluated(entry)
        if self.failures >= MOST_FAILURES:
            raise RunFailed(f"the reward gave no finite score in {self.failures} evaluations in a row.")

    def told(self, made: Evaluation) -> tuple[Tensor, Tensor | None]:
        """Values and gradients fit to be told: a failed evaluation counts as the worst value seen, without slope."""
        good = made.value.isfinite()
        if made.gradient is not None:
            good &= made.gradient.isfinite().all(1)
        if bool(good.any()):
            self.worst = min(self.worst, float(made.value[good].min()))
        value = torch.where(good, made.value, torch.tensor(self.worst if math.isfinite(self.worst) else 0.0))
        gradient = made.gradient
        if gradient is not None:
            gradient = torch.where(good[:, None], gradient, torch.zeros_like(gradient))
        return value, gradient

    def state_dict(self) -> dict[str, Any]:
        """What the next evaluation depends on."""
        sampler = self.objective.sampler
        return {
            "lines": len(self.history), "evaluation": self.evaluation, "failures": self.failures,
            "raw": self.raw, "best": self.best, "best_x": self.best_x, "worst": self.worst,
            "seconds": self.seconds + time.monotonic() - self.started,
            "images": sampler.images, "denoiser_calls": sampler.denoiser_calls,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict` and cuts the history back to it."""
        self.history = self.store.cut_history(state["lines"])
        self.evaluation, self.failures = state["evaluation"], state["failures"]
        self.raw, self.best, self.best_x, self.worst = state["raw"], state["best"], state["best_x"], state["worst"]
        self.seconds = state["seconds"]
        self.objective.sampler.images, self.objective.sampler.denoiser_calls = state["images"], state["denoiser_calls"]


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


class _Parts(NamedTuple):
    strategy: Any
    reward: WeightedSum
    judge: Reward | None
    sampler: Sampler
    space: Any


def _reward(config: RunConfig, device: str, custom: Reward | None) -> WeightedSum:
    if custom is not None:
        return WeightedSum([Term(1.0, config.reward)], [custom])
    terms = parse(config.reward)
    return WeightedSum(terms, [REWARDS.load(term.name)(device) for term in terms])


def _prepare(config: RunConfig, custom: Reward | None) -> _Parts:
    """Loads everything that a run is made of; writes nothing."""
    strategy_class = STRATEGIES.load(config.strategy)
    if strategy_class.uses_gradient and custom is not None and not custom.differentiable:
        raise BadInput(f"strategy {config.strategy!r} needs a differentiable reward, but {config.reward} is not.")
    device, dtype = check_device(config.device, config.dtype)
    reward = _reward(config, device, custom)
    judge = None if config.judge == "none" else JUDGES.load(config.judge)(device)
    source = resolve(config.model)
    sampler = load(
        source, config.sampler_settings, device=device, dtype=dtype, scheduler=config.scheduler, chunk=config.chunk
    )
    space = SPACES.load(config.space)(sampler.width, config.token_shape(), config.seed)
    return _Parts(strategy_class, reward, judge, sampler, space)


def _execute(
    config: RunConfig,
    store: Store,
    reporter: Reporter,
    parts: _Parts,
    temporary: tempfile.TemporaryDirectory[str] | None = None,
) -> Result:
    strategy_class, reward, judge, sampler, space = parts
    full = strategy_class.uses_gradient
    if (store.folder / "space.safetensors").exists():
        space.load_state_dict(store.read_tensors("space.safetensors")[0])
    else:
        store.write_tensors("space.safetensors", space.state_dict())
    coordinates = space.coordinates(full=full)
    steps = (config.budget - config.search_seeds) // (config.search_seeds * config.batch_size)
    problem = Problem(
        coordinates.start, coordinates.lower, coordinates.upper, steps * config.batch_size, config.batch_size,
        config.seed,
    )  # fmt: skip
    options = [config.gradient_options()] if config.strategy == "gradient" else []
    strategy: Strategy = strategy_class(problem, *options)

    loop = _Loop(config, store, reporter, Objective(config, sampler, reward, judge, space, full))
    state = store.load_checkpoint()
    if state is None:
        store.cut_history(0)
    else:
        strategy.load_state_dict(state.pop("strategy"))
        loop.load_state_dict(state)
    reporter.started(config, store.folder, loop.history)
    tokens, limit = sampler.token_count(config.prompt)
    if tokens > limit:
        reporter.warned(f"the prompt has {tokens} tokens; the model's text encoder reads the first {limit}.")
    _search(loop, strategy, steps)
    if not math.isfinite(loop.best):
        raise RunFailed("the reward gave no finite score for any image.")
    summary = _verdict(loop, reward, judge)
    _write_best(loop, space)
    from ipgo_opt.report import report_html

    done = _run_json(config, "finished", summary)
    store.write_text("report.html", report_html(done, loop.history, store.folder))
    store.write_json("run.json", done)
    reporter.finished(summary)
    return Result(summary, loop.history, store.folder, temporary)


def _search(loop: _Loop, strategy: Strategy, steps: int) -> None:
    """The loop of the package: the raw prompt first, then ask, evaluate, tell, record, checkpoint."""
    if loop.evaluation == 0:
        made = loop.objective(None, loop.seeds)
        loop.store.write_image("raw.png", made.images[0])
        loop.record(None, made)
        loop.raw = float(made.scores.mean())
        loop.store.save_checkpoint(loop.state_dict() | {"strategy": strategy.state_dict()})
    while loop.evaluation <= steps:
        x = strategy.ask()
        made = loop.objective(x, loop.seeds, gradient=strategy.uses_gradient)
        loop.record(x, made)
        value, gradient = loop.told(made)
        strategy.tell(x, value, gradient)
        loop.store.save_checkpoint(loop.state_dict() | {"strategy": strategy.state_dict()})


def _verdict(loop: _Loop, reward: WeightedSum, judge: Reward | None) -> dict[str, Any]:
    """Search reward beside held-out reward and judge, on seeds that the search never used."""
    config, objective, sampler = loop.config, loop.objective, loop.objective.sampler
    searched = {"images": sampler.images, "denoiser_calls": sampler.denoiser_calls}
    best_x = None if loop.best_x is None else loop.best_x[None]
    held_out: dict[str, Any] | None = None
    verdict: dict[str, Any] | None = None
    if config.held_out:
        seeds = [FIRST_HELD_OUT_SEED + i for i in range(config.held_out)]
        sides: dict[str, list[Evaluation]] = {"raw": [], "best": []}
        done = 0
        for name, x in (("raw", None), ("best", best_x)):
            for start in range(0, len(seeds), config.chunk):
                part = seeds[start : start + config.chunk]
                sides[name].append(objective(x, part))
                done += len(part)
                loop.reporter.judging(done, 2 * len(seeds))
        scores = {name: torch.cat([made.scores[0] for made in side]) for name, side in sides.items()}
        held_out = {"n": config.held_out}
        for prefix, name in (("", "best"), ("raw_", "raw")):
            held_out[f"{prefix}mean"] = _finite(scores[name].mean())
            held_out[f"{prefix}sd"] = _finite(scores[name].std()) if config.held_out > 1 else 0.0
        held_out["parts"] = {
            f"{prefix}{term.name}": _finite(torch.cat([made.parts[term.name][0] for made in sides[name]]).mean())
            for prefix, name in (("", "best"), ("raw_", "raw"))
            for term in reward.terms
        }
        if judge is not None:
            judged = {
                name: torch.cat([made.judge[0] for made in side if made.judge is not None])
                for name, side in sides.items()
            }
            verdict = {
                "name": config.judge,
                "raw": float(judged["raw"].mean()),
                "optimized": float(judged["best"].mean()),
            }
    return {
        "prompt": config.prompt,
        "model": config.model,
        "space": config.space,
        "strategy": config.strategy,
        "reward": config.reward,
        "seed": config.seed,
        **searched,
        "seconds": round(loop.seconds + time.monotonic() - loop.started, 2),
        "raw_reward": _finite(loop.raw),
        "search_reward": loop.best,
        "held_out": held_out,
        "judge": verdict,
        "failed": sum(record["reward"] is None for record in loop.history),
        "out": str(loop.store.folder),
    }


def _write_best(loop: _Loop, space: Any) -> None:
    """best.safetensors: the tokens and the embeddings that a diffusers pipeline takes as they are."""
    config, objective = loop.config, loop.objective
    x = None if loop.best_x is None else loop.best_x[None]
    with torch.no_grad():
        conditioning = objective.applied(x)[0].levelled()
        tensors = {"prompt_embeds": conditioning.prompt_embeds, **conditioning.extra}
        if conditioning.negative_prompt_embeds is not None:
            tensors["negative_prompt_embeds"] = conditioning.negative_prompt_embeds
        if x is not None:
            tensors["x"] = x[0]
            tensors |= {name: V[0] for name, V in space.tokens(x, full=objective.full).items()}
    settings = objective.sampler.settings
    metadata = {
        "format": "ipgo-opt conditioning 1",
        "prompt": config.prompt,
        "negative_prompt": config.negative_prompt,
        "model": config.model,
        "scheduler": type(objective.sampler.pipeline.scheduler).__name__,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "height": settings.height,
        "width": settings.width,
        "seed": config.seed,
        "reward": config.reward,
        "ipgo_opt": __version__,
    }
    loop.store.write_tensors("best.safetensors", tensors, {key: str(value) for key, value in metadata.items()})


__all__ = ["Objective", "Reporter", "Result", "optimize", "resume", "to_pil"]

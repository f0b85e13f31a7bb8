"""A run from a configuration to its verdict: `optimize`, `resume`, and the place where all parts are put together."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ipgo_opt import __version__
from ipgo_opt.config import FIRST_HELD_OUT_SEED, RunConfig, check, check_device, configure
from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.loop import Loop, Reporter, finite
from ipgo_opt.models import EMBEDDED, load_pipeline, make_sampler
from ipgo_opt.objective import Evaluation, Objective
from ipgo_opt.rewards import JUDGES
from ipgo_opt.rewards.base import Reward, RewardFailed, Term, WeightedSum, prepare, shown
from ipgo_opt.rewards.custom import from_object
from ipgo_opt.rewards.goals import goal
from ipgo_opt.rewards.similarity import Embed, prepare_similarity, similarity
from ipgo_opt.spaces import SPACES
from ipgo_opt.store import FORMAT, Store, check_out, read_run, to_pil
from ipgo_opt.strategies import STRATEGIES
from ipgo_opt.strategies.base import Problem, Strategy
from ipgo_opt.strategies.llm import LlmOptions
from ipgo_opt.strategies.promptist import PromptistOptions

if TYPE_CHECKING:
    from PIL.Image import Image

    from ipgo_opt.models.sampler import Sampler


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
    reward: str | Reward | Callable[..., Any] | None = None,
    strategy: str | None = None,
    space: str | None = None,
    model: str = "emoji",
    budget: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
    loaded: dict[Any, Any] | None = None,
    **settings: Any,
) -> Result:
    """Finds a better image for a prompt without touching the model.

    Args:
        prompt: what the image should show.
        reward: a specification ("clip+0.2*aesthetic", "judge.py:score"), a function of images and prompts, or an object
            with the Reward contract; larger is better.
        strategy: who searches, as `ipgo-opt list` names it; "gradient" if it is not given.
        space: what is searched, likewise; "tokens" if it is not given.
        model: a name, a diffusers folder or a hub id.
        budget: images that the search may generate, the raw one included.
        seed: of the noise, the space and the strategy.
        out: the run directory; without it the run lives in a temporary one until `Result.save`.
        reporter: is told what happens.
        loaded: models and rewards that earlier runs have loaded; pass the same dict to several runs.
        settings: any other field of RunConfig.

    Raises:
        BadInput: a setting breaks a rule; nothing was written.
        RunFailed: the run could not go on; `resume` may.

    """
    custom = None if reward is None or isinstance(reward, str) else from_object(reward)
    if isinstance(reward, str) and reward.startswith("object:"):
        raise BadInput(f"reward must be a name or a weighted sum, but got {reward!r}.")
    if custom is not None:
        reward = custom.name
    config = configure(
        prompt, reward=reward, strategy=strategy, space=space, model=model, budget=budget, seed=seed, **settings
    )
    temporary = tempfile.TemporaryDirectory(prefix="ipgo-opt-") if out is None else None
    folder = Path(out) if out is not None else Path(temporary.name)  # type: ignore[union-attr]
    check_out(folder)
    parts = _prepare(config, custom, {} if loaded is None else loaded)
    store = Store(folder)
    try:
        store.write_json("run.json", _run_json(config, "running"))
        return _execute(config, store, reporter or Silence(), parts, temporary)
    finally:
        store.close()


def resume(
    folder: str | Path,
    *,
    reward: Reward | Callable[..., Any] | None = None,
    reporter: Reporter | None = None,
    loaded: dict[Any, Any] | None = None,
) -> Result:
    """Continues a run that was stopped; on the CPU it ends as if it never had been.

    Args:
        folder: the run directory.
        reward: the reward object again, if the run was started with one.
        reporter: is told what happens.
        loaded: as in `optimize`.

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
    custom = None if reward is None else from_object(reward)
    store = Store(Path(folder))
    try:
        parts = _prepare(config, custom, {} if loaded is None else loaded)
        return _execute(config, store, reporter or Silence(), parts)
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


class _Parts(NamedTuple):
    strategy: Any
    reward: WeightedSum
    judge: Reward | None
    sampler: Sampler
    space: Any


def _prepare(config: RunConfig, custom: Reward | None, loaded: dict[Any, Any]) -> _Parts:
    """Loads everything that a run is made of and that `loaded` has not yet; writes nothing."""

    def once(make: Callable[..., Any], *made_of: Any) -> Any:
        key = (make, *made_of)
        if key not in loaded:
            loaded[key] = make(*made_of)
        return loaded[key]

    strategy_class = STRATEGIES.load(config.strategy)
    device, dtype = check_device(config.device, config.dtype)
    reward = (
        once(_reward, config.reward, device, config.model in EMBEDDED)
        if custom is None
        else WeightedSum([Term(1, config.reward)], [custom])
    )
    if strategy_class.uses_gradient and not reward.differentiable:
        raise BadInput(
            f"strategy {config.strategy!r} needs a differentiable reward, but {shown(config.reward)} is not."
        )
    judge = None if config.judge == "none" else once(_judge, config.judge, device, config.model in EMBEDDED)
    pipeline = once(load_pipeline, config.model_source(), device, dtype, config.memory_levers())
    sampler = make_sampler(pipeline, config.sampler_settings, scheduler=config.scheduler, chunk=config.chunk)
    space = SPACES.load(config.space).made(config, sampler)
    if config.task == "attack":
        reward = reward.negated()
        embed = once(_similarity, config.similarity, device, config.model in EMBEDDED)
        space.keep_similar(lambda texts: similarity(embed, texts, config.prompt), config.similarity_floor)
    return _Parts(strategy_class, reward, judge, sampler, space)


def _reward(spec: str, device: str, embedded: bool) -> WeightedSum:
    return prepare(spec, embedded).load(device)


def _similarity(spec: str, device: str, embedded: bool) -> Embed:
    return prepare_similarity(spec, embedded)(device)


def _options(config: RunConfig, space: Any) -> list[Any]:
    """What a strategy is given beside its problem."""
    if config.strategy == "gradient":
        return [config.gradient_options()]
    if config.strategy == "llm":
        return [space.texts, config.chat(), LlmOptions(config.llm_mode, goal(config.reward), config.prompt)]
    if config.strategy == "promptist":
        return [space.texts, PromptistOptions(config.promptist, config.promptist_template, config.trust_remote_code)]
    return []


def _judge(name: str, device: str, embedded: bool) -> Reward:
    return JUDGES.load(name)(device) if name in JUDGES else _reward(name, device, embedded)


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
    steps = (config.budget - config.tried_seeds) // (config.search_seeds * config.batch_size)
    problem = Problem(
        coordinates.start, coordinates.lower, coordinates.upper, max(steps, 1) * config.batch_size, config.batch_size,
        config.seed, coordinates.groups,
    )  # fmt: skip
    strategy: Strategy = strategy_class(problem, *_options(config, space))

    loop = Loop(config, store, reporter, Objective(config, sampler, reward, judge, space, full))
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
    try:
        loop.search(strategy, steps)
        if not math.isfinite(loop.best):
            raise RunFailed("the reward gave no finite score for any image.")
        summary = _verdict(loop, reward, judge)
    except RewardFailed as failed:
        if failed.image is not None:
            store.write_image("failed.png", failed.image)
        raise
    _write_best(loop, space)
    from ipgo_opt.report import report_html

    done = _run_json(config, "finished", summary)
    store.write_text("report.html", report_html(done, loop.history, store.folder))
    store.write_json("run.json", done)
    reporter.finished(summary)
    return Result(summary, loop.history, store.folder, temporary)


def _verdict(loop: Loop, reward: WeightedSum, judge: Reward | None) -> dict[str, Any]:
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
            held_out[f"{prefix}mean"] = finite(scores[name].mean())
            held_out[f"{prefix}sd"] = finite(scores[name].std()) if config.held_out > 1 else 0.0
        held_out["parts"] = {
            f"{prefix}{term.name}": finite(torch.cat([made.parts[term.name][0] for made in sides[name]]).mean())
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
        "reward": shown(config.reward),
        "seed": config.seed,
        **searched,
        "seconds": round(loop.seconds + time.monotonic() - loop.started, 2),
        "raw_reward": finite(loop.raw),
        "seeds": loop.seeds,
        "seed_reward": finite(loop.seed_reward),
        "search_reward": loop.best,
        "held_out": held_out,
        "judge": verdict,
        "optimized": objective.readable(loop.best_x) or None,
        "failed": sum(record["reward"] is None for record in loop.history),
        "out": str(loop.store.folder),
    }


def _write_best(loop: Loop, space: Any) -> None:
    """best.safetensors: the tokens and the embeddings that a diffusers pipeline takes as they are."""
    config, objective = loop.config, loop.objective
    x = None if loop.best_x is None else loop.best_x[None]
    with torch.no_grad():
        tensors = objective.sampler.tensors(objective.applied(x)[0])
        if x is not None:
            tensors |= {"x": x[0], **space.learned(x[0], full=objective.full)}
    settings = objective.sampler.settings
    metadata = {
        "format": "ipgo-opt conditioning 1",
        "prompt": config.prompt,
        "negative_prompt": config.negative_prompt,
        **{f"optimized_{name}": text for name, text in objective.readable(loop.best_x).items()},
        "model": config.model,
        "revision": config.revision,
        "scheduler": type(objective.sampler.pipeline.scheduler).__name__,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "height": objective.sampler.size[0],
        "width": objective.sampler.size[1],
        "seed": loop.seeds[0],
        "reward": shown(config.reward),
        "ipgo_opt": __version__,
    }
    loop.store.write_tensors("best.safetensors", tensors, {key: str(value) for key, value in metadata.items()})


__all__ = ["Objective", "Reporter", "Result", "optimize", "resume", "to_pil"]

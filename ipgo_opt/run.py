"""Runs from configurations to their verdicts: `optimize`, `resume`, and the place where all parts are put together.

One prompt is one run; many prompts are as many runs in one pass; tokens shared by many prompts are one run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from ipgo_opt import __version__
from ipgo_opt.artefact import versions, write_conditioning
from ipgo_opt.config import CLIMBERS, RunConfig, check, check_device, configure, configure_each, title
from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.loop import Loop, Reporter, Search, drive, finite
from ipgo_opt.models import EMBEDDED, load_pipeline, make_sampler
from ipgo_opt.models.raw_images import RawImages
from ipgo_opt.objective import Objective, readable
from ipgo_opt.policy import PolicyLoop, PolicyObjective
from ipgo_opt.rewards import JUDGES
from ipgo_opt.rewards.base import Reward, RewardFailed, Term, WeightedSum, prepare, shown
from ipgo_opt.rewards.custom import from_object
from ipgo_opt.rewards.goals import goal
from ipgo_opt.rewards.similarity import Embed, prepare_similarity, similarity
from ipgo_opt.shared import SharedLoop
from ipgo_opt.spaces import SPACES
from ipgo_opt.store import FORMAT, Store, check_out, read_history, read_run, slug, to_pil
from ipgo_opt.strategies import STRATEGIES
from ipgo_opt.strategies.base import Problem, Strategy
from ipgo_opt.strategies.llm import LlmOptions
from ipgo_opt.strategies.promptist import PromptistOptions
from ipgo_opt.verdict import give_verdicts

if TYPE_CHECKING:
    from PIL.Image import Image

    from ipgo_opt.models.sampler import Sampler


class Silence:
    """A reporter that says nothing."""

    def started(self, config: RunConfig, out: Path, history: list[dict[str, Any]], runs: int = 1) -> None:
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


@overload
def optimize(prompt: str, **settings: Any) -> Result: ...
@overload
def optimize(*, prompts: Sequence[str], shared: Literal[True], **settings: Any) -> Result: ...
@overload
def optimize(*, prompts: Sequence[str], **settings: Any) -> list[Result]: ...


def optimize(
    prompt: str | None = None,
    *,
    prompts: Sequence[str] | None = None,
    shared: bool = False,
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
) -> Result | list[Result]:
    """Finds better images for prompts without touching the model.

    Args:
        prompt: what the image should show.
        prompts: instead of `prompt`: many prompts, each optimized on its own but all in one pass.
        shared: whether one set of tokens is learned for all of `prompts` instead.
        reward: a specification ("clip+0.2*aesthetic", "judge.py:score"), a function of images and prompts, or an object
            with the Reward contract; larger is better.
        strategy: who searches, as `ipgo-opt list` names it; "gradient" if it is not given.
        space: what is searched, likewise; "tokens" if it is not given.
        model: a name, a diffusers folder or a hub id.
        budget: images that the search may generate, the raw one included: of each prompt, or of all that share tokens.
        seed: of the noise, the space and the strategy.
        out: the run directory (of many prompts: with a run directory for each); without it the run lives in a temporary
            one until `Result.save`.
        reporter: is told what happens.
        loaded: models and rewards that earlier runs have loaded; pass the same dict to several runs.
        settings: any other field of RunConfig.

    Returns:
        The result, or one for each of `prompts` where they do not share tokens.

    Raises:
        BadInput: a setting breaks a rule; nothing was written.
        RunFailed: the run could not go on; `resume` may. Of many prompts, those that could are finished.

    """
    if (prompt is None) == (prompts is None) or (shared and prompts is None):
        raise BadInput("give a prompt, or several as prompts (and shared only with these).")
    custom = None if reward is None or isinstance(reward, str) else from_object(reward)
    if isinstance(reward, str) and reward.startswith("object:"):
        raise BadInput(f"reward must be a name or a weighted sum, but got {reward!r}.")
    if custom is not None:
        reward = custom.name
    given = settings | {
        "reward": reward, "strategy": strategy, "space": space, "model": model, "budget": budget, "seed": seed
    }  # fmt: skip
    if shared:
        configs = [configure(title(prompts or ()), shared=True, prompts=prompts, **given)]
    else:
        configs = configure_each([prompt] if prompts is None else prompts, **given)  # type: ignore[list-item]
    temporary = tempfile.TemporaryDirectory(prefix="ipgo-opt-") if out is None else None
    folder = Path(out) if out is not None else Path(temporary.name)  # type: ignore[union-attr]
    check_out(folder)
    parts = assemble(configs[0], custom, {} if loaded is None else loaded)
    many = prompts is not None and not shared
    with _opened(folder) as store:
        if many:
            homes = _homes(folder, configs)
            store.write_json("run.json", _many_json(configs, homes, folder, "running"))
            return _execute_many(configs, homes, store, reporter or Silence(), parts, temporary)
        store.write_json("run.json", _run_json(configs[0], "running"))
        return _execute(configs[0], store, reporter or Silence(), parts, temporary)


def resume(
    folder: str | Path,
    *,
    reward: Reward | Callable[..., Any] | None = None,
    reporter: Reporter | None = None,
    loaded: dict[Any, Any] | None = None,
) -> Any:
    """Continues a run that was stopped; on the CPU it ends as if it never had been.

    Args:
        folder: the run directory.
        reward: the reward object again, if the run was started with one.
        reporter: is told what happens.
        loaded: as in `optimize`.

    Returns:
        What `optimize` would have returned: a Result, or a list of them.

    """
    run = read_run(Path(folder))
    many = "configs" in run
    try:
        configs = [RunConfig(**config) for config in (run["configs"] if many else [run["config"]])]
    except (TypeError, KeyError) as error:
        raise BadInput(f"run.json in {str(folder)!r} has no usable configuration: {error}") from None
    homes = [Path(folder) / home for home in run["folders"]] if many else [Path(folder)]
    if run["status"] == "finished":
        results = [Result(read_run(home)["result"], read_history(home), home) for home in homes]
        return results if many else results[0]
    if configs[0].reward.startswith("object:") and reward is None:
        raise BadInput(f"the run was started with the reward object {configs[0].reward[7:]}; pass it to resume.")
    for config in configs:
        check(config)
    custom = None if reward is None else from_object(reward)
    with _opened(Path(folder)) as store:
        parts = assemble(configs[0], custom, {} if loaded is None else loaded)
        if many:
            return _execute_many(configs, homes, store, reporter or Silence(), parts)
        return _execute(configs[0], store, reporter or Silence(), parts)


def optimize_side_by_side(
    configs: Sequence[RunConfig],
    homes: Sequence[Path],
    folder: Path,
    *,
    reporter: Reporter | None = None,
    loaded: dict[Any, Any] | None = None,
) -> list[Result]:
    """Runs of different prompts in one pass, each in a run directory of its own.

    Args:
        configs: complete configurations that differ in their prompts only.
        homes: the run directory of each.
        folder: keeps the state of all while they last; `resume` continues it.
        reporter: is told what happens.
        loaded: as in `optimize`.

    Returns:
        Their results; RunFailed once the others are finished if some could not go on.

    """
    parts = assemble(configs[0], None, {} if loaded is None else loaded)
    with _opened(folder) as store:
        store.write_json("run.json", _many_json(configs, homes, folder, "running"))
        return _execute_many(configs, homes, store, reporter or Silence(), parts)


def _run_json(config: RunConfig, status: str, result: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "format": FORMAT, "ipgo_opt": __version__, "status": status, "config": dataclasses.asdict(config),
        "versions": versions(), "result": result,
    }  # fmt: skip


def _many_json(configs: Sequence[RunConfig], homes: Sequence[Path], folder: Path, status: str) -> dict[str, Any]:
    return {
        "format": FORMAT, "ipgo_opt": __version__, "status": status,
        "configs": [dataclasses.asdict(config) for config in configs], "versions": versions(),
        "folders": [os.path.relpath(home, folder) for home in homes],
    }  # fmt: skip


def _homes(folder: Path, configs: Sequence[RunConfig]) -> list[Path]:
    """The run directory of each of many prompts."""
    return [folder / f"{number:0{len(str(len(configs)))}d}-{slug(one.prompt)}" for number, one in enumerate(configs)]


@contextmanager
def _opened(folder: Path) -> Iterator[Store]:
    store = Store(folder)
    try:
        yield store
    finally:
        store.close()


class Parts(NamedTuple):
    """What a run is made of: the solver's class, what scores, what paints, what is searched, what else is loaded."""

    strategy: Any
    reward: WeightedSum
    judge: Reward | None
    sampler: Sampler
    space: Any
    loaded: dict[Any, Any]


def assemble(config: RunConfig, custom: Reward | None, loaded: dict[Any, Any]) -> Parts:
    """Loads everything that a run is made of and that `loaded` has not yet; writes nothing."""
    strategy_class = STRATEGIES.load(config.strategy)
    device, dtype = check_device(config.device, config.dtype)
    reward = (
        _once(loaded, _reward, config.reward, device, config.model in EMBEDDED)
        if custom is None
        else WeightedSum([Term(1, config.reward)], [custom])
    )
    if config.strategy in CLIMBERS and not reward.differentiable:
        raise BadInput(
            f"strategy {config.strategy!r} needs a differentiable reward, but {shown(config.reward)} is not."
        )
    judge = None if config.judge == "none" else _once(loaded, _judge, config.judge, device, config.model in EMBEDDED)
    pipeline = _once(loaded, load_pipeline, config.model_source(), device, dtype, config.memory_levers())
    sampler = make_sampler(pipeline, config.sampler_settings, scheduler=config.scheduler, chunk=config.chunk)
    space = _space(config, sampler, loaded)
    if config.task == "attack":
        reward = reward.negated()
    return Parts(strategy_class, reward, judge, sampler, space, loaded)


def _once(loaded: dict[Any, Any], make: Callable[..., Any], *made_of: Any) -> Any:
    """What `make` gives, made if `loaded` does not hold it yet."""
    key = (make, *made_of)
    if key not in loaded:
        loaded[key] = make(*made_of)
    return loaded[key]


def _space(config: RunConfig, sampler: Sampler, loaded: dict[Any, Any]) -> Any:
    """What is searched."""
    space = SPACES.load(config.space).made(config, sampler)
    if config.task == "attack":
        device = check_device(config.device, config.dtype)[0]
        embed = _once(loaded, _similarity, config.similarity, device, config.model in EMBEDDED)
        space.keep_similar(lambda texts: similarity(embed, texts, config.prompt), config.similarity_floor)
    return space


def _reward(spec: str, device: str, embedded: bool) -> WeightedSum:
    return prepare(spec, embedded).load(device)


def _similarity(spec: str, device: str, embedded: bool) -> Embed:
    return prepare_similarity(spec, embedded)(device)


def _options(config: RunConfig, space: Any) -> list[Any]:
    """What a strategy is given beside its problem."""
    if config.strategy in ("gradient", "policy"):
        return [config.gradient_options()]
    if config.strategy == "llm":
        return [space.texts, config.chat(), LlmOptions(config.llm_mode, goal(config.reward), config.prompt)]
    if config.strategy == "promptist":
        return [space.texts, PromptistOptions(config.promptist, config.promptist_template, config.trust_remote_code)]
    return []


def _judge(name: str, device: str, embedded: bool) -> Reward:
    return JUDGES.load(name)(device) if name in JUDGES else _reward(name, device, embedded)


def _strategy(config: RunConfig, parts: Parts, steps: int) -> Strategy:
    """The solver on the space's coordinates, told of the evaluations that the budget leaves it."""
    coordinates = parts.space.coordinates(full=parts.strategy.uses_gradient)
    problem = Problem(
        coordinates.start, coordinates.lower, coordinates.upper, max(steps, 1) * config.batch_size, config.batch_size,
        config.seed, coordinates.groups,
    )  # fmt: skip
    strategy: Strategy = parts.strategy(problem, *_options(config, parts.space))
    return strategy


def _search(config: RunConfig, store: Store, reporter: Reporter, parts: Parts, room: int) -> Search:
    """The search that a configuration describes, at its start."""
    if config.shared:
        return SharedLoop(config, store, reporter, _strategy(config, parts, config.schedule.count("update")))
    steps = (config.budget - config.tried_seeds) // (config.search_seeds * config.batch_size)
    loop = PolicyLoop if config.strategy == "policy" else Loop
    return loop(config, store, reporter, _strategy(config, parts, steps), steps, room)


def _fix_space(space: Any, store: Store) -> None:
    """The space as it was when the run was started; of a new run, as it is."""
    if (store.folder / "space.safetensors").exists():
        space.load_state_dict(store.read_tensors("space.safetensors")[0])
    else:
        store.write_tensors("space.safetensors", space.state_dict())


def _execute(
    config: RunConfig,
    store: Store,
    reporter: Reporter,
    parts: Parts,
    temporary: tempfile.TemporaryDirectory[str] | None = None,
) -> Result:
    _fix_space(parts.space, store)
    search = _search(config, store, reporter, parts, config.chunk)
    state = store.load_checkpoint()
    if state is None:
        store.cut_history(0)
    else:
        search.load_state_dict(state)
    reporter.started(config, store.folder, search.history)
    _warn_of_length(config.prompts or [config.prompt], parts.sampler, reporter)
    _run([search], store, reporter, parts, lambda: store.save_checkpoint(search.state_dict()))
    summary = _finish(search, parts)
    reporter.finished(summary)
    return Result(summary, search.history, store.folder, temporary)


def _execute_many(
    configs: Sequence[RunConfig],
    homes: Sequence[Path],
    store: Store,
    reporter: Reporter,
    parts: Parts,
    temporary: tempfile.TemporaryDirectory[str] | None = None,
) -> list[Result]:
    """All runs in one pass; while they last, one checkpoint holds the state of all."""
    with ExitStack() as stack:
        stores = [stack.enter_context(_opened(home)) for home in homes]
        room = configs[0].chunk // len(configs)
        searches = []
        for config, own in zip(configs, stores, strict=True):
            space = _space(config, parts.sampler, parts.loaded) if parts.space.one_prompt else None
            mine = parts if space is None else parts._replace(space=space)
            _fix_space(mine.space, own)  # without a space of their own it is the same for all: they share its seed
            searches.append(_search(config, own, reporter, mine, room))
            searches[-1].space = space
        state = store.load_checkpoint()
        for n, search in enumerate(searches):
            if state is None:
                search.store.cut_history(0)
                search.store.write_json("run.json", _run_json(search.config, "running"))
            else:
                search.load_state_dict(state["runs"][n])
        done = [record for search in searches for record in search.history]
        together = dataclasses.replace(configs[0], prompt=title([config.prompt for config in configs]))
        reporter.started(together, store.folder, done, len(configs))
        _warn_of_length([config.prompt for config in configs], parts.sampler, reporter)

        def save() -> None:
            store.save_checkpoint({"runs": [search.state_dict() for search in searches]})

        _run(searches, store, reporter, parts, save, lenient=True)
        results = []
        for search, home in zip(searches, homes, strict=True):
            search.store.save_checkpoint(search.state_dict())
            if search.failed is None:  # what was written before the pass was killed is not written again
                known = read_run(home)
                summary = known["result"] if known["status"] == "finished" else _finish(search, parts)
                results.append(Result(summary, search.history, home, temporary))
    failed = [search for search in searches if search.failed is not None]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(searches)} prompts failed, the first, {failed[0].config.prompt!r}, with: "
            f"{failed[0].failed}"
        )
    store.write_json("run.json", _many_json(configs, homes, store.folder, "finished"))
    for result in results:
        reporter.finished(result.summary)
    return results


def _run(
    searches: Sequence[Search],
    store: Store,
    reporter: Reporter,
    parts: Parts,
    save: Callable[[], None],
    *,
    lenient: bool = False,
) -> None:
    """Search, and the verdict on it; what each search found is left in it."""
    full = parts.strategy.uses_gradient
    made = PolicyObjective if searches[0].config.strategy == "policy" else Objective
    kept = parts.loaded.get(RawImages)
    objective = made(searches[0].config, parts.sampler, parts.reward, parts.judge, parts.space, full, kept)
    try:
        drive(searches, objective, save, lenient=lenient)
        for search in searches:
            if search.failed is None and not math.isfinite(search.best):
                search.failed = RunFailed("the reward gave no finite score for any image.")
                if not lenient:
                    raise search.failed
        give_verdicts([search for search in searches if search.failed is None], objective, reporter)
    except RewardFailed as failed:
        if failed.image is not None:
            store.write_image("failed.png", failed.image)
        raise


def _warn_of_length(prompts: Sequence[str], sampler: Sampler, reporter: Reporter) -> None:
    for prompt in prompts:
        tokens, limit = sampler.token_count(prompt)
        if tokens > limit:
            reporter.warned(f"the prompt has {tokens} tokens; the model's text encoder reads the first {limit}.")


def _finish(search: Search, parts: Parts) -> dict[str, Any]:
    """Summary, artefact, report and run.json of a search that is over."""
    from ipgo_opt.report import report_html

    config, store, full = search.config, search.store, parts.strategy.uses_gradient
    space, raw = search.space or parts.space, (config.prompt, config.negative_prompt)
    summary = {
        "prompt": config.prompt,
        "model": config.model,
        "space": config.space,
        "strategy": config.strategy,
        "reward": shown(config.reward),
        "seed": config.seed,
        "images": search.images,
        "denoiser_calls": search.denoiser_calls,
        "seconds": round(search.elapsed, 2),
        "raw_reward": finite(search.raw),
        **search.summary(),
        "seed_reward": finite(search.seed_reward),
        "search_reward": search.best,
        "held_out": search.held_out,
        "judge": search.judged,
        "optimized": readable(space, raw, search.best_x, full=full) or None,
        "failed": sum(record["reward"] is None for record in search.history),
        "out": str(store.folder),
    }
    write_conditioning(search, parts.sampler, space, full=full)
    done = _run_json(config, "finished", summary)
    store.write_text("report.html", report_html(done, search.history, store.folder))
    store.write_json("run.json", done)
    return summary


__all__ = ["Objective", "Reporter", "Result", "optimize", "resume", "to_pil"]

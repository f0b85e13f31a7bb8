"""The command line: parses, calls the public Python API and prints."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ipgo_opt import __version__
from ipgo_opt.config import MODEL_DEFAULTS, MOST_STRENGTH, PIPELINES_OWN, RunConfig
from ipgo_opt.errors import BadInput, IpgoError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Finds a better image for a prompt without touching the diffusion model.",
)  # fmt: skip

PAPER = {field.name: field.default for field in dataclasses.fields(RunConfig)}


def _default(name: str) -> str:
    """What a setting is when it is not given."""
    empty = "the model's own" if name == "scheduler" else "none"
    others = "Stable Diffusion 1 and 2, the pipeline's own elsewhere" if name in PIPELINES_OWN else "other models"
    own = [f"{values[name] or empty} for {model}" for model, values in MODEL_DEFAULTS.items() if name in values]
    paper = PAPER[name] if PAPER[name] != "" else empty
    return f" [default: {', '.join([*own, f'{paper} for {others}' if own else str(paper)])}]"


def _option(text: str, *names: str, setting: str | None = None) -> Any:
    name = setting or names[0].lstrip("-").replace("-", "_")
    return typer.Option(*names, help=text + _default(name), show_default=False)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]


STRATEGY = _option("Who searches: see `list strategies`.", "--strategy")
SETTINGS: dict[str, tuple[Any, Any]] = {
    "space": (str, _option("What is searched: see `list spaces`.", "--space")),
    "reward": (str, _option(
        "What is good: a name, file.py:function, module:function, an address or a weighted sum.", "--reward"
    )),
    "judge": (str, _option("Held-out judge: judge, a reward that is not optimized, or none.", "--judge")),
    "model": (str, typer.Option("--model", help="emoji, a diffusers folder, a .safetensors file or a hub id. [default: emoji]")),
    "revision": (str, _option("Branch, tag or commit of a hub id.", "--revision")),
    "variant": (str, _option("Which files of the model, for example fp16.", "--variant")),
    "model_config": (str, _option("Folder or hub id of what a .safetensors file lacks.", "--model-config")),
    "trust_remote_code": (bool, _option("Run code that the model brings.", "--trust-remote-code")),
    "budget": (int, _option("Images the search may generate, the raw one included.", "--budget")),
    "seed": (int, _option("Seed of noise, space and strategy.", "--seed")),
    "search_seeds": (int, _option("Seeds every candidate is scored on.", "--search-seeds")),
    "seed_share": (float, _option("Share of the budget for choosing the seed first, 0 to 1.", "--seed-share")),
    "held_out": (int, _option("Fresh seeds for the verdict.", "--held-out")),
    "num_inference_steps": (
        int, _option("Sampler steps.", "--steps", "--num-inference-steps", setting="num_inference_steps")
    ),
    "guidance_scale": (float, _option("Guidance, classifier-free or distilled.", "--guidance-scale")),
    "true_cfg_scale": (float, _option("Classifier-free guidance on top of a distilled one.", "--true-cfg-scale")),
    "height": (int, _option("Pixels; 0 for the model's own.", "--height")),
    "width": (int, _option("Pixels; 0 for the model's own.", "--width")),
    "scheduler": (str, _option("A scheduler class of diffusers.", "--scheduler")),
    "negative_prompt": (str, _option("The unconditional prompt.", "--negative-prompt")),
    "grad_steps": (int, _option("K: last steps that are differentiated.", "--grad-steps")),
    "eta": (float, _option("Share of fresh noise in every step of DDIM, 0 to 1.", "--eta")),
    "lv_samples": (int, _option("DRaFT-LV: noisier copies of each image for the gradient.", "--lv-samples")),
    "gamma": (float, _option("Weight of the conformity penalty.", "--gamma")),
    "prefix": (int, _option("Tokens before the prompt.", "--prefix")),
    "suffix": (int, _option("Tokens after the prompt.", "--suffix")),
    "basis": (str, _option("What E spans: random, states or a run directory.", "--basis")),
    "basis_size": (int, _option("N: basis vectors.", "--basis-size")),
    "layout": (str, _option("shared or per_token.", "--layout")),
    "rank": (int, _option("Rank of the adapter.", "--rank")),
    "lora_targets": (str, _option("Layers that get an adapter: endings of names, with commas.", "--lora-targets")),
    "noise_weight": (float, _option("Factor on the noise's penalty beside gamma.", "--noise-weight")),
    "noise_unit": (float, _option("Factor on the noise's steps beside the tokens'.", "--noise-unit")),
    "scale": (float, _option("Factor on the tokens.", "--scale")),
    "spread": (float, _option("Z starts within this bound.", "--spread")),
    "rotation": (bool, _option("Rotate the tokens.", "--rotation/--no-rotation", setting="rotation")),
    "constraints": (str, _option("Of value, conformity and orthonormality, or none.", "--constraints")),
    "attend": (bool, _option("Let the tokens attend to the prompt first (IPGO+).", "--attend")),
    "anchor": (bool, _option("Add the prompt's mean state to the tokens; emoji has it for tokens that a gradient searches.", "--anchor/--no-anchor", setting="anchor")),
    "learning_rate": (float, _option("The gradient's step size.", "--learning-rate", "--lr", setting="learning_rate")),
    "decay": (float, _option("Factor on the learning rate.", "--decay")),
    "decay_every": (int, _option("Updates between two decays.", "--decay-every")),
    "max_grad_norm": (float, _option("Gradient clipping.", "--max-grad-norm")),
    "optimizer": (str, _option("Of the gradient: adam or nesterov.", "--optimizer")),
    "inner_updates": (int, _option("DDPO: updates from one batch of images.", "--inner-updates")),
    "clip_range": (float, _option("DDPO: how far the importance ratio may be from 1.", "--clip-range")),
    "batch_size": (int, _option("Candidates per step.", "--batch-size")),
    "chunk": (int, _option("Most images per pipeline call.", "--chunk")),
    "patience": (int, _option("Evaluations without a better one after which to stop; 0: never.", "--patience")),
    "task": (str, _option("improve, or attack: the lowest reward by exchanged words.", "--task")),
    "words": (str, _option("Word lists: a JSON file, vocabulary, wordnet or llm.", "--words")),
    "similarity": (str, _option("Of texts: clip, clip:NAME or file.py:function.", "--similarity")),
    "similarity_floor": (float, _option("Least similarity of an attack's prompt.", "--similarity-floor")),
    "shortcut_start": (float, _option("Where the gradient of words is first taken, 0 to 1.", "--shortcut-start")),
    "promptist": (str, _option("Folder or hub id of the language model that rephrases.", "--promptist")),
    "promptist_template": (str, _option("What it is given.", "--promptist-template")),
    "llm_model": (str, _option("Language model at OPENAI_BASE_URL.", "--llm-model")),
    "llm_mode": (str, _option("single instruction, or history of scores.", "--llm-mode")),
    "llm_calls": (int, _option("Most requests to it.", "--llm-calls")),
    "llm_timeout": (float, _option("Seconds that it may be silent.", "--llm-timeout")),
    "device": (str, _option("auto, cpu, cuda, cuda:1, mps.", "--device")),
    "dtype": (str, _option("auto, float32, float16, bfloat16, float64.", "--dtype")),
    "memory": (str, _option("Memory levers, separated by commas: see docs/models.md.", "--memory")),
    "low_memory": (bool, _option("Pull the levers that leave the image as it is.", "--low-memory")),
}  # fmt: skip
"""Types and options of the settings that every command which searches takes; None is the model's default."""


def _with_settings(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command that takes **settings an option for each of SETTINGS."""

    def widen(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
            for name, (kind, option) in SETTINGS.items()
            if name not in left_out
        ]
        ordered = sorted([*own, *more], key=lambda p: p.kind)
        command.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in ordered}
        return command

    return widen


@app.command()
@_with_settings()
def run(
    prompt: Annotated[str | None, typer.Argument(help="What the image should show.", show_default=False)] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Many prompts instead: a text, CSV, JSON or JSONL file (FILE:COLUMN), a set in the package, or "
            "hub:OWNER/NAME@SPLIT[:ROWS]:COLUMN."
        ),
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Learn one set of tokens for all prompts, not one for each.")
    ] = False,
    validation: Annotated[
        str | None, typer.Option(help="With --shared: prompts to choose by. [default: every tenth]", show_default=False)
    ] = None,
    prompt_batch: Annotated[
        int | None, typer.Option(help="With --shared: prompts per update. [default: 4]", show_default=False)
    ] = None,
    validate_every: Annotated[
        int | None,
        typer.Option(help="With --shared: updates between validations. [default: an epoch]", show_default=False),
    ] = None,
    judge_tolerance: Annotated[
        float | None,
        typer.Option(help="With --shared: share by which the judge may fall. [default: 0.1]", show_default=False),
    ] = None,
    strategy: Annotated[str | None, STRATEGY] = None,
    method: Annotated[
        str | None, typer.Option(help="A published method, which sets space, strategy and more: see `list methods`.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory. [default: runs/PROMPT-N]", show_default=False)
    ] = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Searches for a better image of PROMPT, or of many prompts."""
    from ipgo_opt.config import configure, configure_each
    from ipgo_opt.methods import method_settings
    from ipgo_opt.prompt_files import read_prompts

    own = {"prompt_batch": prompt_batch, "validate_every": validate_every, "judge_tolerance": judge_tolerance}
    if not shared:
        for name, value in {"validation": validation, **own}.items():
            if value is not None:
                raise BadInput(f"--{name.replace('_', '-')} goes with --shared, but got {value!r} without it.")
    if (prompt is None) == (prompts is None):
        raise BadInput("give a prompt, or several with --prompts FILE.")
    if shared and prompts is None:
        raise BadInput(f"--shared needs several prompts (--prompts FILE), but got the prompt {prompt!r}.")
    given = {name: value for name, value in (settings | own | {"strategy": strategy}).items() if value is not None}
    if method is not None:
        given = method_settings(method) | given
    found = None if prompts is None else read_prompts(prompts)
    if validation is not None:
        given["validation"] = read_prompts(validation)
    what: dict[str, Any] = {"prompt": prompt} if found is None else {"prompts": found, "shared": shared}
    # complain before a directory is chosen, and before torch is imported
    if shared:
        configure(prompts or "", **what, **given)
    else:
        configure_each([prompt or ""] if found is None else found, **given)
    from ipgo_opt.run import optimize

    folder = out or _fresh_folder(prompt or Path(prompts or "").stem)
    _show(lambda reporter: optimize(**what, out=folder, reporter=reporter, **given), as_json)


@app.command()
@_with_settings("space")
def compare(
    prompts: Annotated[list[str], typer.Argument(help="What the images should show.", metavar="PROMPT...")],
    strategies: Annotated[
        str, typer.Option(help="Solvers, separated by commas: strategies, methods or SPACE*STRATEGY.")
    ] = "gradient,bayes,cma,random,seeds",
    repeats: Annotated[int, typer.Option(help="Runs per prompt and solver, on different seeds.")] = 1,
    reference: Annotated[
        str | None, typer.Option(help="Solver to compare with. [default: random, or the first]", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory; one that is there is continued. [default: runs/compare-PROMPT]", show_default=False
        ),
    ] = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Compares solvers on the same prompts, noise and number of images. Stopped, the same line continues it."""
    from ipgo_opt.comparison import compare as compare_solvers
    from ipgo_opt.comparison import named, plan
    from ipgo_opt.display import Comparison
    from ipgo_opt.store import slug

    given = {"budget": 100} | {name: value for name, value in settings.items() if value is not None}
    names = [name.strip() for name in strategies.split(",")]
    folder = out or Path("runs") / f"compare-{slug(prompts[0])}"
    plan(prompts, named(names), folder, repeats=repeats, **given)
    watcher = Comparison()
    try:
        made = compare_solvers(
            prompts, names, out=folder, repeats=repeats, reference=reference, watcher=watcher, **given
        )
    finally:
        watcher.stop()
    if as_json:
        print(json.dumps(made, ensure_ascii=False))
    else:
        watcher.show(made, folder)


bench = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Runs a benchmark suite; stopped, the same line continues it."
)
app.add_typer(bench, name="bench")

Prompts = Annotated[list[str] | None, typer.Option(
    "--prompts", help="FILE, NAME=FILE, hub:OWNER/NAME@SPLIT[:ROWS]:COLUMN or a shipped set such as animals; may be repeated. [default: the five categories]", show_default=False
)]  # fmt: skip
Limit = Annotated[int, typer.Option(help="Prompts of each file, from its beginning; 0 for all.")]
Jobs = Annotated[int, typer.Option(help="Runs at the same time, each in a process of its own.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")]
SoFar = Annotated[bool, typer.Option("--so-far", help="Write the tables of what is finished by now, and stop.")]
Suite = Annotated[Path | None, typer.Option("--out", help="Directory. [default: runs/bench-SUITE]", show_default=False)]


@bench.command()
@_with_settings("space", "reward", "seed_share")
def table1(
    prompts: Prompts = None,
    rewards: Annotated[str, typer.Option(help="Rewards, separated by commas.")] = "clip,aesthetic",
    methods: Annotated[
        str, typer.Option(help="Methods, strategies or SPACE*STRATEGY, separated by commas.")
    ] = "ipgo,best-of-n",
    seed_shares: Annotated[
        str, typer.Option(help="Shares of the budget for choosing the seed, separated by commas.")
    ] = "0",
    repeats: Annotated[int, typer.Option(help="Runs per cell and prompt, on different seeds.")] = 1,
    limit: Limit = 0,
    jobs: Jobs = 1,
    dry_run: DryRun = False,
    so_far: SoFar = False,
    out: Suite = None,
    **settings: Any,
) -> None:
    """The paper's table 1: every method on groups of prompts for several rewards."""
    from ipgo_opt.bench.suites import groups, numbers, table1
    from ipgo_opt.bench.tables import table1_grids

    given = {"budget": 100} | {name: value for name, value in settings.items() if value is not None}
    folder = out or Path("runs/bench-table1")
    parts = table1(
        groups(prompts, limit), _names(rewards), _names(methods), folder,
        seed_shares=numbers(seed_shares), repeats=repeats, **given,
    )  # fmt: skip
    _bench("table1", "Table 1", folder, parts, lambda entries: table1_grids(parts, entries), jobs, dry_run, so_far)


@bench.command()
@_with_settings("space", "strategy")
def ablate(
    what: Annotated[
        str,
        typer.Argument(
            help="basis, lengths, rotation, constraints, truncation, seeds, anchor, norm, noise or learning-rate."
        ),
    ],
    prompts: Prompts = None,
    method: Annotated[str, typer.Option(help="Whose seeds or learning rate; the others are IPGO's.")] = "ipgo",
    repeats: Annotated[int, typer.Option(help="Runs per variant and prompt, on different seeds.")] = 1,
    limit: Limit = 0,
    jobs: Jobs = 1,
    dry_run: DryRun = False,
    so_far: SoFar = False,
    out: Suite = None,
    **settings: Any,
) -> None:
    """One of the paper's ablations of IPGO, or what a method owes to its seeds or step size."""
    from ipgo_opt.bench.suites import ABLATIONS, ablation, groups
    from ipgo_opt.bench.tables import ablation_grid
    from ipgo_opt.methods import method_settings

    given: dict[str, Any] = {"budget": 100, "reward": "clip"} | method_settings(method)
    given |= {name: value for name, value in settings.items() if value is not None}
    folder = out or Path(f"runs/bench-{what}")
    every = [prompt for group in groups(prompts, limit).values() for prompt in group]
    part = ablation(what, list(dict.fromkeys(every)), folder=folder, repeats=repeats, **given)
    reference = ABLATIONS[what][0]
    _bench(
        what,
        f"Ablation: {what}",
        folder,
        [part],
        lambda entries: [ablation_grid(part, entries, reference)],
        jobs,
        dry_run,
        so_far,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _bench(
    stem: str, title: str, folder: Path, parts: Any, grids: Callable[[Any], Any], jobs: int, dry_run: bool, so_far: bool
) -> None:
    """Says what a suite costs, runs it and writes its tables."""
    from ipgo_opt.bench.runner import examine, run_all, what_is_finished
    from ipgo_opt.bench.tables import markdown, write
    from ipgo_opt.display import Comparison
    from ipgo_opt.store import Store

    print(examine(parts, timed=dry_run).text(jobs), file=sys.stderr)
    if dry_run:
        return
    if so_far:
        parts = what_is_finished(parts)
    # another process may be running what is left: only who runs takes the lock
    store, watcher = None if so_far else Store(folder), Comparison()
    try:
        entries, failures = run_all(parts, jobs=jobs, watcher=watcher)
        about = f"`{_command_line()}`"
        made = grids(entries)
        files = write(folder, stem, title, about, made, parts, entries)
    finally:
        watcher.stop()
        if store is not None:
            store.close()
    print(markdown(made))
    print(f"{folder}/{', '.join(files)}", file=sys.stderr)
    if failures:
        from ipgo_opt.errors import RunFailed

        first, message = next(iter(failures.items()))
        raise RunFailed(f"{len(failures)} runs failed, the first of them {first}: {message}")


def _command_line() -> str:
    """The command as it was typed."""
    import shlex

    return f"ipgo-opt {shlex.join(sys.argv[1:])}"


@app.command()
def resume(folder: Annotated[Path, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """Continues a run that was stopped."""
    from ipgo_opt.run import resume as resume_run

    _show(lambda reporter: resume_run(folder, reporter=reporter), as_json)


def _fresh_folder(prompt: str) -> Path:
    """runs/SLUG-N with the first N that is free."""
    from ipgo_opt.store import slug

    n = 0
    while (folder := Path("runs") / f"{slug(prompt)}-{n}").exists():
        n += 1
    return folder


def _show(work: Any, as_json: bool) -> None:
    """Runs `work(reporter)` with the display and prints the result as JSON if asked."""
    from ipgo_opt.display import Display

    display = Display()
    try:
        result = work(display)
    finally:
        display.stop()
    results = result if isinstance(result, list) else [result]
    if as_json:
        found = [one.summary for one in results]
        print(json.dumps(found if isinstance(result, list) else found[0], ensure_ascii=False))
    elif not display.history:
        for one in results:
            display.finished(one.summary)


@app.command()
def apply(
    source: Annotated[Path, typer.Argument(help="A run directory or a conditioning file.", metavar="DIR|FILE")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What the image should show; may be repeated.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="More of them: a file or a set, as `run` takes it.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the noise: 3, 0-7 or 0,2,5.")] = "0",
    strength: Annotated[str, typer.Option(help="Factor on the inserted tokens, 0 to 1.5; several with commas.")] = "1",
    reward: Annotated[str | None, typer.Option(help="Score the images with this reward.")] = None,
    judge: Annotated[str | None, typer.Option(help="A second opinion: judge, or a reward.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Another copy of the model that the tokens were learned on.")
    ] = None,
    picture: Annotated[bool, typer.Option("--grid", help="Write grid.png: raw beside every strength.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where images go. [default: runs/apply-PROMPT-N]", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Makes images of new prompts without and with learned tokens."""
    from ipgo_opt.prompt_files import read_prompts

    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not texts:
        raise BadInput("give at least one --prompt, or --prompts FILE.")
    numbers, factors = _numbers(seeds), _factors(strength)
    from ipgo_opt.apply import apply as apply_tokens
    from ipgo_opt.display import show_applied

    folder = out or _fresh_folder(f"apply-{texts[0]}")
    made = apply_tokens(
        source, texts, seeds=numbers, strengths=factors, reward=reward, judge=judge, model=model, out=folder,
        picture=picture,
    )  # fmt: skip
    if as_json:
        print(json.dumps(made | {"out": str(folder)}, ensure_ascii=False))
    else:
        show_applied(made, folder)


def _numbers(text: str) -> list[int]:
    """The seeds that 3, 0-7 or 0,2,5-6 stands for."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise BadInput(f"seeds must be numbers and ranges such as 0-7 or 0,2,5, but got {text!r}.")
        found += range(int(first), int(last if dash else first) + 1)
    if not found:
        raise BadInput(f"seeds must name one at least, but got {text!r}.")
    return found


def _factors(text: str) -> list[float]:
    """Strengths between commas, in range."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"strength must be a number, or several with commas, but got {text!r}.") from None
    for value in found:
        if not 0 <= value <= MOST_STRENGTH:
            raise BadInput(f"`0 <= strength <= {MOST_STRENGTH}` must hold, but got strength={value}.")
    return found


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """Makes the best image of a run again from its conditioning file. Exit code 1 if it is another one."""
    from ipgo_opt.verify import verify as verify_run

    found = verify_run(folder)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        print("the same, pixel for pixel" if found["same"] else
              f"not the same: {found['different_pixels']} pixels differ, by up to {found['largest_difference']} of 255")  # fmt: skip
        for name, versions in found["versions"].items():
            print(f"{name} was {versions['then']} then and is {versions['now']} now")
    if not found["same"]:
        raise typer.Exit(1)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="A run directory.")],
    words: Annotated[int, typer.Option(help="Words of the model's vocabulary to compare with.")] = 512,
    nearest: Annotated[int, typer.Option(help="Words to name for each token.")] = 5,
    as_json: Json = False,
) -> None:
    """Shows which words the learned tokens are near to, their norms and angles, and how the reward went."""
    from ipgo_opt.reading import read_tokens

    found = read_tokens(folder, words=words, nearest=nearest)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    from ipgo_opt.display import show_tokens

    show_tokens(found)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run directory or a conditioning file.", metavar="DIR|FILE")],
    comfyui: Annotated[
        Path, typer.Option(help="File to write for ComfyUI (.safetensors); the negative half goes beside it.")
    ],
) -> None:
    """Writes the conditioning of a run for another tool."""
    from ipgo_opt.artefact import load_conditioning, write_comfyui

    for path in write_comfyui(load_conditioning(source), comfyui):
        print(path)


@app.command(name="list")
def list_names(
    kind: Annotated[str, typer.Argument(help="models, rewards, strategies, spaces or methods; all without.")] = "",
) -> None:
    """Lists what can be named."""
    from ipgo_opt.methods import METHODS
    from ipgo_opt.models import MODELS
    from ipgo_opt.registry import unknown
    from ipgo_opt.rewards import JUDGES, REWARDS
    from ipgo_opt.spaces import SPACES
    from ipgo_opt.strategies import STRATEGIES

    groups: dict[str, dict[str, str]] = {
        "models": MODELS,
        "rewards": {name: entry.summary for name, entry in REWARDS.items()},
        "judges": {name: entry.summary for name, entry in JUDGES.items()},
        "strategies": {name: entry.summary for name, entry in STRATEGIES.items()},
        "spaces": {name: entry.summary for name, entry in SPACES.items()},
        "methods": {name: method.summary for name, method in METHODS.items()},
    }
    if kind and kind not in groups:
        raise unknown("what to list", kind, list(groups))
    for title, names in groups.items():
        if kind in ("", title):
            print(title)
            for name, summary in names.items():
                print(f"  {name:<24} {summary}")


@app.command()
def doctor(
    as_json: Json = False,
    models: Annotated[
        bool, typer.Option("--models", help="Show which pipelines of diffusers can be searched.")
    ] = False,
) -> None:
    """Shows versions, devices, which weights are present and how to get the missing ones. Exit code 1 on a problem."""
    from ipgo_opt.doctor import examine, print_models, print_report
    from ipgo_opt.models.interface import support_matrix

    if models:
        if as_json:
            print(json.dumps(support_matrix(), ensure_ascii=False))
        else:
            print_models()
        return
    findings = examine()
    if as_json:
        print(json.dumps(findings, ensure_ascii=False))
    else:
        print_report(findings)
    if findings["problems"]:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Finds a better image for a prompt without touching the diffusion model."""
    if version:
        print(f"ipgo-opt {__version__}")
        raise typer.Exit


def entry() -> None:
    """The `ipgo-opt` command: exit code 0, 2 for bad input, 1 for a run that failed, 130 for Ctrl-C."""
    try:
        try:
            app()
        except SystemExit as end:
            if end.code == 130:
                raise KeyboardInterrupt from None
            raise
    except BadInput as problem:
        _fail(str(problem), 2)
    except IpgoError as problem:
        if details := getattr(problem, "details", ""):
            print(details, file=sys.stderr)
        _fail(str(problem), 1)
    except KeyboardInterrupt:
        _fail("stopped; `ipgo-opt resume DIR` continues.", 130)


def _fail(message: str, code: int) -> None:
    print(f"ipgo-opt: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    entry()

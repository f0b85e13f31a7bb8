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
from ipgo_opt.config import MODEL_DEFAULTS, PIPELINES_OWN, RunConfig
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
    "gamma": (float, _option("Weight of the conformity penalty.", "--gamma")),
    "prefix": (int, _option("Tokens before the prompt.", "--prefix")),
    "suffix": (int, _option("Tokens after the prompt.", "--suffix")),
    "basis": (str, _option("What E spans: random, states or a run directory.", "--basis")),
    "basis_size": (int, _option("N: basis vectors.", "--basis-size")),
    "layout": (str, _option("shared or per_token.", "--layout")),
    "scale": (float, _option("Factor on the tokens.", "--scale")),
    "spread": (float, _option("Z starts within this bound.", "--spread")),
    "learning_rate": (float, _option("Adam's step size.", "--learning-rate", "--lr", setting="learning_rate")),
    "decay": (float, _option("Factor on the learning rate.", "--decay")),
    "decay_every": (int, _option("Updates between two decays.", "--decay-every")),
    "max_grad_norm": (float, _option("Gradient clipping.", "--max-grad-norm")),
    "batch_size": (int, _option("Candidates per step.", "--batch-size")),
    "chunk": (int, _option("Most images per pipeline call.", "--chunk")),
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
    "dtype": (str, _option("auto, float32, float16, bfloat16.", "--dtype")),
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
    prompt: Annotated[str, typer.Argument(help="What the image should show.")],
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
    """Searches for a better image of PROMPT."""
    from ipgo_opt.config import configure
    from ipgo_opt.methods import method_settings

    given = {name: value for name, value in (settings | {"strategy": strategy}).items() if value is not None}
    if method is not None:
        given = method_settings(method) | given
    configure(prompt, **given)  # complain before a directory is chosen, and before torch is imported
    from ipgo_opt.run import optimize

    _show(lambda reporter: optimize(prompt, out=out or _fresh_folder(prompt), reporter=reporter, **given), as_json)


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
    from ipgo_opt.comparison import plan
    from ipgo_opt.display import Comparison
    from ipgo_opt.store import slug

    given = {"budget": 100} | {name: value for name, value in settings.items() if value is not None}
    names = [name.strip() for name in strategies.split(",")]
    folder = out or Path("runs") / f"compare-{slug(prompts[0])}"
    plan(prompts, names, folder, repeats=repeats, **given)
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
    if as_json:
        print(json.dumps(result.summary, ensure_ascii=False))
    elif not display.history:
        display.finished(result.summary)


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

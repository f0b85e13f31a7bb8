"""The command line: parses, calls the public Python API and prints."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ipgo_opt import __version__
from ipgo_opt.config import MODEL_DEFAULTS, RunConfig
from ipgo_opt.errors import BadInput, IpgoError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Finds a better image for a prompt without touching the diffusion model.",
)  # fmt: skip

PAPER = {field.name: field.default for field in dataclasses.fields(RunConfig)}


def _default(name: str) -> str:
    """What a setting is when it is not given."""
    empty = "none" if name == "negative_prompt" else "the model's own"
    own = [f"{values[name] or empty} for {model}" for model, values in MODEL_DEFAULTS.items() if name in values]
    paper = PAPER[name] if PAPER[name] != "" else empty
    return f" [default: {', '.join([*own, f'{paper} for other models' if own else str(paper)])}]"


def _option(text: str, *names: str, setting: str | None = None) -> Any:
    name = setting or names[0].lstrip("-").replace("-", "_")
    return typer.Option(*names, help=text + _default(name), show_default=False)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="What the image should show.")],
    strategy: Annotated[str | None, _option("Who searches: see `list strategies`.", "--strategy")] = None,
    space: Annotated[str | None, _option("What is searched: see `list spaces`.", "--space")] = None,
    reward: Annotated[str | None, _option("What is good: a name or a weighted sum.", "--reward")] = None,
    judge: Annotated[str | None, _option("Held-out judge, or none.", "--judge")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="emoji, a diffusers folder or a hub id. [default: emoji]")
    ] = None,
    budget: Annotated[int | None, _option("Images the search may generate, the raw one included.", "--budget")] = None,
    seed: Annotated[int | None, _option("Seed of noise, space and strategy.", "--seed")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory. [default: runs/PROMPT-N]", show_default=False)
    ] = None,
    search_seeds: Annotated[int | None, _option("Seeds every candidate is scored on.", "--search-seeds")] = None,
    held_out: Annotated[int | None, _option("Fresh seeds for the verdict.", "--held-out")] = None,
    num_inference_steps: Annotated[
        int | None, _option("Sampler steps.", "--steps", "--num-inference-steps", setting="num_inference_steps")
    ] = None,
    guidance_scale: Annotated[float | None, _option("Classifier-free guidance.", "--guidance-scale")] = None,
    height: Annotated[int | None, _option("Pixels; 0 for the model's own.", "--height")] = None,
    width: Annotated[int | None, _option("Pixels; 0 for the model's own.", "--width")] = None,
    scheduler: Annotated[str | None, _option("A scheduler class of diffusers.", "--scheduler")] = None,
    negative_prompt: Annotated[str | None, _option("The unconditional prompt.", "--negative-prompt")] = None,
    grad_steps: Annotated[int | None, _option("K: last steps that are differentiated.", "--grad-steps")] = None,
    gamma: Annotated[float | None, _option("Weight of the conformity penalty.", "--gamma")] = None,
    prefix: Annotated[int | None, _option("Tokens before the prompt.", "--prefix")] = None,
    suffix: Annotated[int | None, _option("Tokens after the prompt.", "--suffix")] = None,
    basis: Annotated[int | None, _option("N: basis vectors.", "--basis")] = None,
    layout: Annotated[str | None, _option("shared or per_token.", "--layout")] = None,
    scale: Annotated[float | None, _option("Factor on the tokens.", "--scale")] = None,
    spread: Annotated[float | None, _option("Z starts within this bound.", "--spread")] = None,
    learning_rate: Annotated[
        float | None, _option("Adam's step size.", "--learning-rate", "--lr", setting="learning_rate")
    ] = None,
    decay: Annotated[float | None, _option("Factor on the learning rate.", "--decay")] = None,
    decay_every: Annotated[int | None, _option("Updates between two decays.", "--decay-every")] = None,
    max_grad_norm: Annotated[float | None, _option("Gradient clipping.", "--max-grad-norm")] = None,
    batch_size: Annotated[int | None, _option("Candidates per step.", "--batch-size")] = None,
    chunk: Annotated[int | None, _option("Most images per pipeline call.", "--chunk")] = None,
    device: Annotated[str | None, _option("auto, cpu, cuda, cuda:1, mps.", "--device")] = None,
    dtype: Annotated[str | None, _option("auto, float32, float16, bfloat16.", "--dtype")] = None,
    as_json: Json = False,
) -> None:
    """Searches for a better image of PROMPT."""
    settings = {name: value for name, value in locals().items() if name not in ("prompt", "out", "as_json")}
    from ipgo_opt.config import configure

    configure(prompt, **settings)  # complain before a directory is chosen, and before torch is imported
    from ipgo_opt.run import optimize

    given = {name: value for name, value in settings.items() if value is not None}
    _show(lambda reporter: optimize(prompt, out=out or _fresh_folder(prompt), reporter=reporter, **given), as_json)


@app.command()
def resume(folder: Annotated[Path, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """Continues a run that was stopped."""
    from ipgo_opt.run import resume as resume_run

    _show(lambda reporter: resume_run(folder, reporter=reporter), as_json)


def _fresh_folder(prompt: str) -> Path:
    """runs/SLUG-N with the first N that is free."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "run"
    n = 0
    while (folder := Path("runs") / f"{slug}-{n}").exists():
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
    kind: Annotated[str, typer.Argument(help="models, rewards, strategies or spaces; all without.")] = "",
) -> None:
    """Lists what can be named."""
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
    }
    if kind and kind not in groups:
        raise unknown("what to list", kind, list(groups))
    for title, names in groups.items():
        if kind in ("", title):
            print(title)
            for name, summary in names.items():
                print(f"  {name:<12} {summary}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Shows versions, devices, which weights are present and how to get the missing ones. Exit code 1 on a problem."""
    from ipgo_opt.doctor import examine, print_report

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
        _fail(str(problem), 1)
    except KeyboardInterrupt:
        _fail("stopped; `ipgo-opt resume DIR` continues.", 130)


def _fail(message: str, code: int) -> None:
    print(f"ipgo-opt: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    entry()

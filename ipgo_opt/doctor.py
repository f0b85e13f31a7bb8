"""`ipgo-opt doctor`: what this machine has, what is missing, and the cure for what is broken."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ipgo_opt import __version__
from ipgo_opt.models import EMBEDDED, MODELS
from ipgo_opt.models.interface import support_matrix
from ipgo_opt.rewards.clip import EMOJI
from ipgo_opt.rewards.weights import Weights

PACKAGES = (
    "torch", "torchvision", "diffusers", "transformers", "accelerate", "open_clip_torch", "botorch", "gpytorch",
    "nevergrad", "safetensors", "scipy", "typer", "rich", "pillow", "huggingface_hub",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Versions, devices, weights and problems of this installation."""
    import torch

    problems: list[str] = []
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
            problems.append(f"{name} is not installed; cure: pip install {name}")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass  # already named above
    except RuntimeError as error:
        problems.append(
            f"torchvision {versions['torchvision']} does not match torch {versions['torch']} ({error}); "
            "cure: pip install --force-reinstall torch torchvision, so that pip chooses both together"
        )
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    weights = []
    for name in MODELS:
        if name in EMBEDDED:
            present = (EMBEDDED[name] / "model_index.json").is_file()
            cure = "reinstall ipgo-opt"
        else:
            present, cure = _cached(name), f"hf download {name}"
        weights.append({"name": name, "kind": "model", "present": present, "get": cure})
        if name in EMBEDDED and not present:
            problems.append(f"the embedded model {name} is missing; cure: {cure}")
    for name, path in {
        "clip": EMOJI / "clip" / "model.safetensors",
        "judge": EMOJI / "judge" / "model.safetensors",
        "aesthetic": EMOJI / "aesthetic.safetensors",
        "preference": EMOJI / "preference" / "model.safetensors",
    }.items():
        present = path.is_file()
        weights.append({"name": f"{name} (emoji)", "kind": "reward", "present": present, "get": "reinstall ipgo-opt"})
        if not present:
            problems.append(f"the embedded reward {name} is missing; cure: reinstall ipgo-opt")
    for file in reward_weights():
        present = file.find() is not None
        weights.append({"name": f"{file.reward} ({file.size})", "kind": "reward", "present": present, "get": file.get})
    return {
        "ipgo_opt": __version__,
        "python": platform.python_version(),
        "executable": Path(sys.executable).name,
        "versions": versions,
        "devices": devices,
        "weights": weights,
        "problems": problems,
    }


def reward_weights() -> list[Weights]:
    """The weights of the rewards for real models, as far as they can be named before they are chosen."""
    from ipgo_opt.rewards import aesthetic, hps, pickscore

    return [aesthetic.BACKBONE_WEIGHTS, aesthetic.LAION, *hps.VERSIONS.values(), pickscore.MODEL]


def _cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id, "model_index.json"), str)


def print_models() -> None:
    """The support matrix of text-to-image pipelines, on standard output, by inspection of what is installed."""
    rows = support_matrix()
    accepted = [row for row in rows if "refused" not in row]
    print(f"{len(accepted)} of the {len(rows)} classes of diffusers' text-to-image mapping can be searched")
    width = max(len(row["pipeline"]) for row in rows)
    for row in accepted:
        kept = f"; as it is: {row['kept']}" if row["kept"] else ""
        print(f"  {row['pipeline']:<{width}}  inserted into {row['inserted']}{kept}; guidance {row['guidance']}")
    print("the others")
    for row in rows:
        if "refused" in row:
            print(f"  {row['pipeline']:<{width}}  {row['refused']}")


def print_report(findings: dict[str, Any]) -> None:
    """The findings for people, on standard output."""
    print(f"ipgo-opt {findings['ipgo_opt']}, Python {findings['python']}")
    for name, found in findings["versions"].items():
        print(f"  {name:<16} {found or 'missing'}")
    print("devices")
    for name, text in findings["devices"].items():
        print(f"  {name:<16} {text}")
    print("weights")
    for entry in findings["weights"]:
        state = "present" if entry["present"] else f"missing; get it with: {entry['get']}"
        print(f"  {entry['kind']:<7} {entry['name']:<44} {state}")
    for problem in findings["problems"]:
        print(f"problem: {problem}")
    if not findings["problems"]:
        print("no problems found")

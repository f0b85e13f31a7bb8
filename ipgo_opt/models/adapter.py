"""Low-rank adapters on a denoiser: put on for one pipeline call by hooks, taken off after it, written as peft does.

Every row of a batch may have weights of its own, and gradients reach them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ipgo_opt.errors import BadInput
from ipgo_opt.models.gate import shadowed

Adapter = dict[str, tuple[Tensor, Tensor]]
"""A (B, r, inputs) and B (B, outputs, r) by the name of a linear layer, one row per image."""

MOST_NAMED = 12
"""Endings of layer names that an error message spells out."""


def linear_layers(model: nn.Module, endings: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linear layers whose names end in one of `endings`, as peft matches them, by name.

    Raises:
        BadInput: an ending matches none.

    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    found: dict[str, tuple[int, int]] = {}
    for ending in endings:
        matched = [name for name in layers if name == ending or name.endswith(f".{ending}")]
        if not matched:
            known = sorted({_ending(name) for name in layers if ".attn" in name or "attention" in name})
            raise BadInput(
                f"each of lora_targets must end the name of a linear layer of the {type(model).__name__}, but "
                f"{ending!r} ends none; its attention has {', '.join(known[:MOST_NAMED]) or 'none'}."
            )
        found |= {name: (layers[name].out_features, layers[name].in_features) for name in matched}
    return {name: found[name] for name in layers if name in found}


def _ending(name: str) -> str:
    """A layer's own name: "to_q", "to_out.0"."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


class Adapted:
    """While open, the named layers of a model give W h + B A h; afterwards the model is as it was.

    A call on m · B rows gives row i the weights of row i mod B (the halves of classifier-free guidance). What gradient
    checkpointing computes again, after this is closed, is computed with the same weights.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model, self.adapter = model, adapter

    def __enter__(self) -> Adapted:
        self.stack = ExitStack()
        if not self.adapter:
            return self
        self.stack.enter_context(self._hooks())
        for part in self.model.modules():
            if getattr(part, "gradient_checkpointing", False):
                self.stack.enter_context(shadowed(part, "_gradient_checkpointing_func", self._again))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stack.close()

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, (A, B) in self.adapter.items():
                hooks.callback(self.model.get_submodule(name).register_forward_hook(_added(A, B)).remove)
            yield

    def _again(self, _: Callable[..., Any]) -> Callable[..., Any]:
        """Gradient checkpointing whose second pass has the adapter on."""
        return lambda part, *args: checkpoint(
            part.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self._hooks())
        )


def _added(A: Tensor, B: Tensor) -> Callable[..., Tensor]:
    """A forward hook that adds B A h to a layer's output."""

    def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = args[0]
        times, rest = divmod(len(hidden), len(A))
        if rest:
            raise BadInput(f"an adapter for {len(A)} images can't be put on a call with {len(hidden)} rows.")
        down, up = (weights.to(hidden.dtype).repeat(times, 1, 1).mT for weights in (A, B))
        return output + (hidden.flatten(1, -2) @ down @ up).view_as(output)

    return add


def peft_files(adapter: Adapter, model: str) -> dict[str, bytes]:
    """The first row's weights as the files that peft saves: adapter_model.safetensors and adapter_config.json."""
    from peft import LoraConfig
    from safetensors.torch import save

    rank = next(iter(adapter.values()))[0].shape[1]
    tensors = {}
    for name, pair in adapter.items():
        for letter, weights in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = weights[0].detach().float().cpu().contiguous()
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(adapter), base_model_name_or_path=model, inference_mode=True
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        written = (Path(folder) / "adapter_config.json").read_bytes()
    return {"adapter_model.safetensors": save(tensors, {"format": "pt"}), "adapter_config.json": written}

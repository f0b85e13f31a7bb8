"""What a pipeline class can be asked for, read off its signatures and its code: no list of class names.

A pipeline can be driven if its `__call__` takes `prompt_embeds` and keeps its undecorated function under `__wrapped__`.
What `encode_prompt` returns is named in its return statement, by the names of the arguments of `__call__`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

from ipgo_opt.errors import BadInput

BESIDE_TEXT = {
    "strength": "it starts from an image, not from text",
    "mask_image": "it starts from an image, not from text",
    "control_image": "it needs a control image beside the text",
    "control_guidance_start": "it needs a control image beside the text",
    "num_frames": "it makes videos",
    "prior_token_ids": "it plans its images from the words themselves, for which embeddings are no substitute",
}
"""Arguments of `__call__` that stand for an input or an output of another kind, and what they mean."""

ONE_IMAGE_PER_CALL = frozenset({"PRXPipeline"})
"""Classes that fail on a batch with guidance: PRX's timestep has two entries, one per half, whatever the batch."""


def text_to_image() -> dict[str, type]:
    """The classes of diffusers' automatic text-to-image mapping, by model type."""
    from diffusers.pipelines import auto_pipeline

    return dict(auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING)


def unsupported(pipeline_class: Any) -> str | None:
    """Why a pipeline class can't be driven by prompt embeddings through the gate, or None if it can."""
    missing = getattr(pipeline_class, "_backends", None)  # of diffusers' stand-ins for classes it can't import
    if missing:
        return f"it needs {' and '.join(missing)}, one of which is not installed"
    call = getattr(pipeline_class.__call__, "__wrapped__", None)
    if call is None:
        return "its __call__ can't be run with gradients"
    arguments = inspect.signature(call).parameters
    for name, reason in BESIDE_TEXT.items():
        if name in arguments:
            return reason
    if "image" in arguments and pipeline_class not in text_to_image().values():
        return "it starts from an image, not from text"
    if "prompt_embeds" not in arguments:
        return "its __call__ takes no prompt_embeds"
    if not {"unet", "transformer"} & set(inspect.signature(pipeline_class.__init__).parameters):
        return "it has no denoiser of its own (unet or transformer)"
    if not hasattr(pipeline_class, "encode_prompt"):
        return "it has no encode_prompt"
    if "prompt_embeds" not in returned(pipeline_class.encode_prompt):
        return "its encode_prompt does not say which of its results are the prompt_embeds"
    return None


def returned(function: Any) -> tuple[str, ...]:
    """The names in a function's last return statement: `return a, b if c else None` gives ("a", "b")."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ()
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    if not values:
        return ()
    parts = values[-1].elts if isinstance(values[-1], ast.Tuple) else [values[-1]]
    bodies = [part.body if isinstance(part, ast.IfExp) else part for part in parts]
    return tuple(body.id if isinstance(body, ast.Name) else "" for body in bodies)


@dataclass(frozen=True)
class Interface:
    """What a supported pipeline class takes and returns.

    Attributes:
        arguments: names of the arguments of `__call__`.
        outputs: what `encode_prompt` returns, by the names of arguments.
        negative_apart: whether `encode_prompt` is called a second time for the negative prompt.
        guidance: the argument that weighs guidance.
        steps, scale: its defaults of the number of sampler steps and of guidance.
        mask: the argument that says which states are read, or "".
        equal_lengths: whether `__call__` refuses halves of different lengths.
        reads: most tokens of a prompt that it reads, as far as `__call__` limits them.
        batches: whether one call makes several images.

    """

    arguments: frozenset[str]
    outputs: tuple[str, ...]
    negative_apart: bool
    guidance: str
    steps: int
    scale: float
    mask: str
    equal_lengths: bool
    reads: float
    batches: bool

    @classmethod
    def of(cls, pipeline_class: Any) -> Interface:
        """Reads a pipeline class; BadInput with the reason if it can't be driven."""
        reason = unsupported(pipeline_class)
        if reason:
            raise BadInput(f"{pipeline_class.__name__} is not supported: {reason}.")
        call = inspect.signature(pipeline_class.__call__.__wrapped__).parameters
        defaults = {name: parameter.default for name, parameter in call.items()}
        outputs = returned(pipeline_class.encode_prompt)
        masks = [name for name in outputs if "mask" in name and not name.startswith("negative_")]
        guidance = "guidance_scale" if defaults.get("guidance_scale") is not None else "true_cfg_scale"
        checks = getattr(pipeline_class, "check_inputs", None)
        return cls(
            arguments=frozenset(call),
            outputs=outputs,
            negative_apart="negative_prompt" not in inspect.signature(pipeline_class.encode_prompt).parameters,
            guidance=guidance,
            steps=defaults["num_inference_steps"],
            scale=float(defaults.get(guidance) or 0),
            mask=masks[0] if masks and masks[0] in call else "",
            equal_lengths=checks is not None and "prompt_embeds.shape != negative" in inspect.getsource(checks),
            reads=defaults.get("max_sequence_length") or float("inf"),
            batches=pipeline_class.__name__ not in ONE_IMAGE_PER_CALL,
        )

    def check_guidance(self, negative_prompt: str, true_cfg_scale: float) -> None:
        """Raises BadInput for a setting that the pipeline would pass over in silence."""
        if true_cfg_scale > 1 and "true_cfg_scale" not in self.arguments:
            raise BadInput(f"this model's pipeline has one guidance only, but got true_cfg_scale={true_cfg_scale}.")
        if negative_prompt and "negative_prompt" not in self.arguments:
            raise BadInput(f"this model's pipeline reads no negative prompt, but got {negative_prompt!r}.")
        distilled = self.guidance == "guidance_scale" and "true_cfg_scale" in self.arguments
        if negative_prompt and distilled and true_cfg_scale <= 1:
            raise BadInput(
                f"this model's pipeline reads a negative prompt if `true_cfg_scale > 1`, but got {negative_prompt!r}, "
                f"true_cfg_scale={true_cfg_scale}."
            )

    def check_eta(self, eta: float) -> None:
        """Raises BadInput for fresh noise in every step where the pipeline has none."""
        if eta > 0 and "eta" not in self.arguments:
            raise BadInput(f"this model's pipeline samples without fresh noise in its steps, but got eta={eta}.")

    def named(self, results: Any, n: int) -> dict[str, Any]:
        """The results of the n-th call of `encode_prompt`, by the arguments of `__call__` that take them.

        Raises:
            BadInput: they are not as many as its return statement names.

        """
        values = results if isinstance(results, tuple) else (results,)
        if len(values) != len(self.outputs):
            raise BadInput(f"encode_prompt must return {', '.join(self.outputs)}, but returned {len(values)} values.")
        before, after = "", f"_{n + 1}" if n else ""
        if n and self.negative_apart:
            before, after = "negative_", ""
        named = {f"{before}{name}{after}": value for name, value in zip(self.outputs, values, strict=True)}
        return {name: value for name, value in named.items() if value is not None and name in self.arguments}

    def row(self) -> dict[str, str]:
        """What the support matrix says of it: what is inserted where, and how it is guided."""
        inserted = "prompt_embeds" + (f", {self.mask} grows" if self.mask else "")
        touched = ("prompt_embeds", self.mask)
        kept = sorted(
            name for name in self.arguments
            if ("prompt_embeds" in name or (name.endswith("_2") and "mask" in name))
            and not name.startswith("negative_") and name not in touched
        )  # fmt: skip
        negative = "negative_prompt_embeds" in self.arguments
        both = negative and {"true_cfg_scale", "guidance_scale"} <= self.arguments and self.guidance == "guidance_scale"
        guided = "distilled or true" if both else "true" if negative else "distilled"
        return {"inserted": inserted, "kept": ", ".join(kept), "guidance": f"{guided} ({self.guidance})"}


def support_matrix() -> list[dict[str, str]]:
    """One row per class of the automatic text-to-image mapping: model, pipeline, and `row` or why it is refused."""
    rows = []
    for model, pipeline_class in text_to_image().items():
        reason = unsupported(pipeline_class)
        facts = {"refused": reason} if reason else Interface.of(pipeline_class).row()
        rows.append({"model": model, "pipeline": pipeline_class.__name__} | facts)
    return rows

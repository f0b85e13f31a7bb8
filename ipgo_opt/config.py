"""The one home of defaults, and the checks that run before any weights load."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipgo_opt.errors import BadInput
from ipgo_opt.models import EMBEDDED, ModelSource, memory, resolve
from ipgo_opt.registry import unknown
from ipgo_opt.spaces import BASES, SPACES
from ipgo_opt.strategies import STRATEGIES

if TYPE_CHECKING:
    from ipgo_opt.llm import Chat
    from ipgo_opt.models.interface import Interface
    from ipgo_opt.models.sampler import SamplerSettings
    from ipgo_opt.spaces.tokens import TokenShape
    from ipgo_opt.spaces.wordlists import WordLists
    from ipgo_opt.strategies.gradient import GradientOptions

FIRST_HELD_OUT_SEED = 10_000_000
"""Seeds from here on are kept for the verdict; searches use smaller ones."""

CONSTRAINTS = ("value", "conformity", "orthonormality")
"""The constraints of the paper on the tokens (section 4.2)."""

FIRST_VALIDATION_SEED = 9_000_000
"""Seeds from here on are those of validation prompts; the training of shared tokens uses smaller ones."""

MOST_STRENGTH = 1.5
"""Largest factor on learned tokens when they are applied; the smallest is 0."""
TASKS = ("improve", "attack")
"""What a search is for: a higher reward, or a lower one."""

CLIMBERS = frozenset({"gradient", "hybrid", "gpo"})
"""Strategies that need the reward's gradient."""

GRADIENT_STRATEGIES = CLIMBERS | {"policy"}
"""Strategies that are told gradients; the others are black boxes."""

SPACES_OF = {"hybrid": ("words",), "gpo": ("words",), "promptist": ("texts",), "llm": ("texts",)}
"""Strategies that search some spaces only; the first is their default."""

STRATEGIES_OF = {
    "seeds": ("random",),
    "words": ("hybrid", "gpo", "evolution", "random", "bayes", "cma", "nevergrad:NAME"),
    "texts": ("llm", "promptist"),
}
"""Spaces that are searched by some strategies only; the first is their default."""

DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run. Defaults are the paper's (arXiv 2503.21812, section 5) for SD 1.5.

    Attributes:
        prompt: the raw prompt C; rewards always score images against it.
        model: "emoji", a diffusers folder, a checkpoint in one safetensors file or a hub id.
        revision: branch, tag or commit of a hub id, "" for the main one.
        variant: which files of the model, for example "fp16"; "" for the plain ones.
        model_config: folder or hub id of the configuration that a checkpoint in one file lacks; "" to infer it.
        trust_remote_code: whether code that the model brings may run.
        space: what is searched.
        strategy: how it is searched.
        reward: name or weighted sum of rewards; larger is better.
        judge: a held-out judge shown beside the reward: "judge" (the embedded model's), a reward that is not optimized,
            or "none".
        budget: images that the search may generate, the raw one included.
        seed: first search seed; also seeds the space and the strategy.
        search_seeds: seeds on which every candidate is scored; their mean counts.
        seed_share: share of the budget spent on trying seeds with the raw prompt; the best `search_seeds` of them are
            searched on (0: the first ones; 1: nothing but seeds, best-of-n).
        held_out: fresh seeds for the verdict, raw and optimized (0 to skip it).
        num_inference_steps: sampler steps T.
        guidance_scale: weight of guidance, classifier-free or distilled, whichever the pipeline has.
        true_cfg_scale: weight of classifier-free guidance on top, in pipelines whose guidance is a distilled one.
        height, width: image size in pixels; 0 for the model's own.
        scheduler: a diffusers scheduler class, "" for the model's own.
        eta: η of DDIM, the share of fresh noise in every step, 0 to 1.
        negative_prompt: prompt of the unconditional half.
        grad_steps: K, last steps that are differentiated; all of them where the noise is searched.
        lv_samples: DRaFT-LV's n, noisier copies of each image whose last step lowers the gradient's variance.
        gamma: weight γ of the conformity penalty, equation (12).
        prefix, suffix: numbers of tokens M_pre and M_suf.
        basis: what E spans at the start: "random", "states" (principal directions of the encoder's states of its own
            words) or the folder of a finished run, whose learned tokens come first.
        basis_size: number N of basis vectors.
        layout: "shared" (equations 6, 7) or "per_token" (the released code's count of parameters).
        rank: of the adapter's matrices.
        lora_targets: endings of the names of the layers that get an adapter, separated by commas.
        noise_weight: factor on the noise's penalty beside the tokens'; with γ it is ReNO's 0.01.
        noise_unit: what a coordinate of 1 adds to the noise, a factor on its steps beside the tokens'.
        scale: factor on the inserted tokens.
        spread: Z starts uniform in [−spread, spread].
        rotation: whether the tokens are rotated by R1 and R2.
        constraints: which of the paper's constraints hold, of "value", "conformity" and "orthonormality", separated by
            commas, or "none".
        attend: whether the tokens attend to the prompt before they are inserted (IPGO+).
        anchor: whether the prompt's mean state is added to the tokens, so that at Z = 0 the image is the raw one.
        learning_rate, decay, decay_every, max_grad_norm: the gradient's schedule and clipping.
        optimizer: of the gradient: "adam" or "nesterov".
        inner_updates: DDPO's updates from one batch of images.
        clip_range: how far DDPO's importance ratio may be from 1.
        batch_size: candidates per step of a black-box strategy.
        chunk: most images per pipeline call.
        patience: evaluations (of shared tokens: validations) in a row without a better one after which a search stops;
            0 for never.
        shared: whether one set of tokens is learned for all of `prompts`; `prompt` is then a title.
        prompts: what shared tokens are trained on, () otherwise.
        validation: prompts that shared tokens are chosen by.
        judge_tolerance: share by which the judge may fall on the validation prompts, below the raw prompts', for shared
            tokens to count as better; 1 for any.
        prompt_batch: prompts per update of shared tokens.
        validate_every: updates between two validations of shared tokens; 0 for an epoch.
        task: "improve" (a higher reward) or "attack" (a lower one by exchanged words; the reward then counts negative).
        words: where word lists come from: a JSON file, "vocabulary", "wordnet", "llm"; "" for the first that is there.
        similarity: what says how similar texts are: a `clip` reward, whose text encoder is used, or a function of texts
            that returns their embeddings (n, D), as file.py:function or module:function.
        similarity_floor: least similarity of an attack's prompt to the raw one, a cosine.
        shortcut_start: share of the sampler's steps before the one at which the gradient of words is first taken.
        promptist: folder or hub id of the causal language model that rephrases prompts, or "emoji", the embedded
            model's.
        promptist_template: what it is given, with {prompt} in it.
        llm_model: the name of a language model at the endpoint in OPENAI_BASE_URL.
        llm_mode: "single" (one instruction, the same every time) or "history" (it sees its rewrites and their scores).
        llm_calls: most requests to it.
        llm_timeout: seconds that it may be silent.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto" (float32 on the CPU, float16 elsewhere) or one of float32, float16, bfloat16, float64.
        memory: levers that save memory, separated by commas: see models/memory.py.
        low_memory: whether to pull those that leave the image as it is.

    """

    prompt: str
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    revision: str = ""
    variant: str = ""
    model_config: str = ""
    trust_remote_code: bool = False
    space: str = "tokens"
    strategy: str = "gradient"
    reward: str = "clip"
    judge: str = "none"
    budget: int = 51
    seed: int = 0
    search_seeds: int = 1
    seed_share: float = 0.0
    held_out: int = 8
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    true_cfg_scale: float = 1.0
    height: int = 0
    width: int = 0
    scheduler: str = "LMSDiscreteScheduler"
    eta: float = 0.0
    negative_prompt: str = ""
    grad_steps: int = 1
    lv_samples: int = 0
    gamma: float = 1e-3
    prefix: int = 10
    suffix: int = 10
    basis: str = "random"
    basis_size: int = 30
    layout: str = "shared"
    rank: int = 6
    lora_targets: str = "to_q,to_v"
    noise_weight: float = 10.0
    noise_unit: float = 1.0
    scale: float = 1.0
    spread: float = 1.0
    rotation: bool = True
    constraints: str = ",".join(CONSTRAINTS)
    attend: bool = False
    anchor: bool = False
    learning_rate: float = 1e-3
    decay: float = 0.9
    decay_every: int = 10
    max_grad_norm: float = 1.0
    optimizer: str = "adam"
    inner_updates: int = 2
    clip_range: float = 1e-4
    batch_size: int = 1
    chunk: int = 8
    patience: int = 0
    shared: bool = False
    prompts: Sequence[str] = ()
    validation: Sequence[str] = ()
    judge_tolerance: float = 1.0
    prompt_batch: int = 4
    validate_every: int = 0
    task: str = "improve"
    words: str = ""
    similarity: str = "clip"
    similarity_floor: float = 0.9
    shortcut_start: float = 0.3
    promptist: str = "microsoft/Promptist"
    promptist_template: str = "{prompt} Rephrase:"
    llm_model: str = "gpt-4o"
    llm_mode: str = "history"
    llm_calls: int = 100
    llm_timeout: float = 60.0
    device: str = "auto"
    dtype: str = "auto"
    memory: str = ""
    low_memory: bool = False

    def model_source(self) -> ModelSource:
        """The model, found and checked but not loaded."""
        return resolve(
            self.model, revision=self.revision, variant=self.variant, remote_code=self.trust_remote_code,
            config=self.model_config,
        )  # fmt: skip

    def memory_levers(self) -> tuple[str, ...]:
        """The levers to pull; BadInput for one that does not exist or does not go with the strategy."""
        levers = memory.parse(self.memory, low=self.low_memory)
        if self.strategy in GRADIENT_STRATEGIES and memory.NO_GRADIENT & set(levers):
            raise BadInput(f"memory lever {min(memory.NO_GRADIENT & set(levers))!r} does not go with a gradient.")
        if self.space == "hard-tokens" and "text-offload" in levers:
            raise BadInput(
                "memory lever 'text-offload' does not go with hard-tokens, whose gradient needs the encoder."
            )
        return levers

    @property
    def used_seeds(self) -> int:
        """Seeds that the search looks at: those that are tried, or with a policy one for every image."""
        return self.budget if self.strategy == "policy" else self.tried_seeds

    @property
    def tried_seeds(self) -> int:
        """Seeds that the raw prompt is tried on; with a share for seeds, they get what does not fill a batch."""
        tried = max(self.search_seeds, math.floor(self.seed_share * self.budget))
        left_over = max(0, self.budget - tried) % (self.search_seeds * self.batch_size)
        return tried + left_over * (self.seed_share > 0)

    @property
    def epoch_updates(self) -> int:
        """Updates of shared tokens between two validations."""
        return self.validate_every or math.ceil(len(self.prompts) / self.prompt_batch)

    @property
    def schedule(self) -> tuple[str, ...]:
        """The evaluations of shared tokens that the budget pays for: "validate" first and last, "update" between."""
        update, validate = self.prompt_batch * self.batch_size, len(self.validation)
        updates, left = self.epoch_updates, self.budget - validate
        rounds, rest = divmod(left, updates * update + validate)
        last = max(0, rest - validate) // update
        out = ["validate", *(["update"] * updates + ["validate"]) * rounds]
        return tuple(out + (["update"] * last + ["validate"] if last else []))

    def token_shape(self) -> TokenShape:
        """The shape of the token space."""
        from ipgo_opt.spaces.tokens import TokenShape

        kept = self.kept_constraints()
        return TokenShape(
            self.prefix, self.suffix, self.basis_size, self.layout, self.scale, self.spread, self.attend,
            self.anchor, self.rotation, orthonormal="orthonormality" in kept, bounded="value" in kept,
        )  # fmt: skip

    def kept_constraints(self) -> set[str]:
        """The constraints that hold; BadInput for one that does not exist."""
        named = set() if self.constraints == "none" else {name.strip() for name in self.constraints.split(",")}
        if not named <= set(CONSTRAINTS):
            raise BadInput(
                f"constraints must be none or some of {', '.join(CONSTRAINTS)}, but got {self.constraints!r}."
            )
        return named

    def layer_names(self) -> list[str]:
        """The endings of the names of the layers that get an adapter."""
        return [name.strip() for name in self.lora_targets.split(",") if name.strip()]

    def gradient_options(self) -> GradientOptions:
        """The settings of the strategies that follow a gradient."""
        from ipgo_opt.strategies.gradient import GradientOptions

        return GradientOptions(self.learning_rate, self.decay, self.decay_every, self.max_grad_norm, self.optimizer)

    @property
    def estimates(self) -> bool:
        """Whether images with a gradient are estimates, of mixtures of words, that are not a result."""
        return self.space == "words"

    def word_source(self) -> str:
        """Where the word lists come from (see `source_of`); BadInput if there is no source."""
        from ipgo_opt.llm import endpoint
        from ipgo_opt.spaces.wordlists import source_of

        return source_of(self.words, self._vocabulary, endpoint() is not None)

    def word_lists(self) -> WordLists:
        """The word lists for the prompt, from their source."""
        from ipgo_opt.spaces.wordlists import gather

        return gather(
            self.word_source(), self.prompt, attack=self.task == "attack", vocabulary=self._vocabulary, chat=self.chat
        )

    @property
    def _vocabulary(self) -> Path | None:
        """The embedded model's words."""
        return EMBEDDED[self.model] / "words.json" if self.model in EMBEDDED else None

    @property
    def asks(self) -> bool:
        """Whether a language model at an endpoint is asked."""
        return self.strategy == "llm" or (self.space == "words" and self.word_source() == "llm")

    def read(self) -> dict[str, Any]:
        """The settings that have a say in this run: those of language models that write no texts of it have none."""
        silent = {"llm_": not self.asks, "promptist": self.strategy != "promptist"}
        unread = tuple(prefix for prefix, yes in silent.items() if yes)
        return {name: value for name, value in vars(self).items() if not (unread and name.startswith(unread))}

    def chat(self) -> Chat:
        """The language model."""
        from ipgo_opt.llm import Chat

        return Chat(self.llm_model, timeout=self.llm_timeout, most_calls=self.llm_calls)

    def sampler_settings(self) -> SamplerSettings:
        """How images are made."""
        from ipgo_opt.models.sampler import SamplerSettings

        return SamplerSettings(
            self.num_inference_steps, self.guidance_scale, self.height, self.width, self.grad_steps,
            self.negative_prompt, self.true_cfg_scale, self.eta,
        )  # fmt: skip


MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "emoji": {
        "reward": "clip+preference",
        "judge": "judge",
        "budget": 100,
        "search_seeds": 4,
        "seed_share": 0.33,
        "scheduler": "",
        "num_inference_steps": 10,
        "guidance_scale": 3.0,
        "chunk": 32,
        "learning_rate": 2e-2,
        "prefix": 2,
        "suffix": 2,
        "spread": 0.1,
        "promptist": "emoji",
    },
}
"""What a model of another size wants instead of the paper's settings, and why:

emoji: 10 steps of its own scheduler, DPM-Solver++, give better images than 50 of LMS, and 32 of them fit in a call; its
tokens have norm 11 and respond to larger steps; twenty inserted tokens of a small norm draw attention away from the
prompt, four do so less. A search on one seed climbs what holds for that seed only: four of them, the best of the first
third of the images, make a gain that fresh seeds and the judge agree with (docs/method.md).
"""

PAPER_CLASS = "StableDiffusionPipeline"
"""The pipeline of the paper's model; every other one starts from its own steps, guidance and scheduler."""

PIPELINES_OWN = ("scheduler", "num_inference_steps", "guidance_scale")

FEW_STEPS = {"stabilityai/sd-turbo": 1, "stabilityai/sdxl-turbo": 1, "black-forest-labs/FLUX.1-schnell": 4}
"""Sampler steps of models that were distilled to few of them and to no guidance; their pipelines do not say so."""


BLACK_BOX_DEFAULTS: dict[str, Any] = {
    "budget": 100, "batch_size": 4, "search_seeds": 1, "seed_share": 0.33, "basis": "states", "basis_size": 8,
    "prefix": 2, "suffix": 2, "spread": 0.0,
}  # fmt: skip
"""What a strategy without gradients wants on every model: few coordinates that are worth searching (32 and 4 angles),
candidates in batches, and a third of the budget for the seed, the strongest coordinate of all (docs/blackbox.md)."""

SHARED_DEFAULTS: dict[str, Any] = {
    "search_seeds": 1, "seed_share": 0.0, "decay": 1.0, "held_out": 1, "patience": 5, "judge_tolerance": 0.1,
    "anchor": False,
}  # fmt: skip
"""What shared tokens want on every model: the paper's constant learning rate, a seed of its own for each image, and an
end when the validation prompts gain no more or lose what they show (a reward that is climbed for long is hacked)."""

EPOCHS = 20
"""Passes over the training prompts of shared tokens that the default budget pays for (arXiv 2503.21812, section 5)."""

MOST_VALIDATION = 12
"""Prompts that are kept apart for validation at most, if none are given: one of ten."""

STRATEGY_DEFAULTS: dict[str, dict[str, Any]] = {"hybrid": {"batch_size": 1}, "gpo": {"batch_size": 1}}
"""What single strategies want instead: as many updates of a distribution as the paper makes."""

STATE_SCALES = {"emoji": 4.0}
"""Factor on the tokens of black boxes and on anchored ones, by model: the states of its text encoder are that large."""

SPACE_DEFAULTS: dict[str, dict[str, Any]] = {
    "embedding": {},
    "noise": {"optimizer": "nesterov", "learning_rate": 5.0, "max_grad_norm": 0.1, "decay": 1.0},
    "tokens+noise": {"decay": 1.0},
    "hard-tokens": {"learning_rate": 0.1, "decay": 1.0, "prefix": 0, "suffix": 8},
    "lora": {"learning_rate": 4e-4, "decay": 1.0},
}
"""What a space wants that a gradient searches, by the papers: ReNO's momentum, step and clipping (its code); PEZ's step
and 8 words; DRaFT's step for SD 1.4, constant."""

EMBEDDED_SPACE_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "emoji": {
        "tokens": {"anchor": True},
        "tokens+noise": {"anchor": True, "noise_unit": 10.0},
        "embedding": {"learning_rate": 0.1},
        "lora": {"learning_rate": 1e-2},
        "noise": {"learning_rate": 20.0},
    },
}
"""The same by embedded model: tokens of a small norm draw attention away from its prompt, on the prompt's mean state
they do not (docs/benchmarks.md); its tokens are larger, its adapter smaller, its noise bears longer steps."""

NOISE_SPACES = ("noise", "tokens+noise")
"""Spaces that the gradient reaches through every sampler step."""

POLICY_DEFAULTS: dict[str, Any] = {
    "scheduler": "DDIMScheduler", "eta": 1.0, "batch_size": 8, "search_seeds": 1, "seed_share": 0.0,
    "learning_rate": 3e-4, "decay": 1.0, "budget": 100,
}  # fmt: skip
"""DDPO's sampler and step, on every model; a batch of 8 images makes its advantages."""


def pipeline_interface(class_name: str) -> Interface:
    """What the pipeline class of that name takes and returns."""
    import diffusers

    from ipgo_opt.models.interface import Interface

    return Interface.of(getattr(diffusers, class_name))


def pipeline_defaults(chosen: dict[str, Any]) -> dict[str, Any]:
    """Steps, guidance and scheduler as the pipeline of a model has them, unless it is the paper's."""
    if chosen["model"] in FEW_STEPS:
        return {"scheduler": "", "num_inference_steps": FEW_STEPS[chosen["model"]], "guidance_scale": 0.0}
    named = {field.name: chosen[field.name] for field in dataclasses.fields(RunConfig) if field.name in chosen}
    class_name = RunConfig("", **named).model_source().class_name
    if class_name in (None, PAPER_CLASS):
        return {}
    interface = pipeline_interface(class_name)
    return {"scheduler": "", "num_inference_steps": interface.steps, "guidance_scale": interface.scale}


def configure(prompt: str, **given: Any) -> RunConfig:
    """A complete, checked configuration; settings that are absent or None take the model's default.

    Raises BadInput with one line that states the rule and the value, before any weights load.
    """
    known = {field.name for field in dataclasses.fields(RunConfig)}
    for name in given:
        if name not in known:
            raise BadInput(f"there is no setting {name!r}; the settings are {', '.join(sorted(known))}.")
    chosen = {name: value for name, value in given.items() if value is not None}
    model = chosen.setdefault("model", "emoji")
    if not isinstance(model, str):
        raise BadInput(f"model must be a name, a folder or a hub id, but got {model!r}.")
    if "space" not in chosen and chosen.get("strategy") in SPACES_OF:
        chosen["space"] = SPACES_OF[str(chosen["strategy"])][0]
    if "strategy" not in chosen and chosen.get("space") in STRATEGIES_OF:
        chosen["strategy"] = STRATEGIES_OF[str(chosen["space"])][0]
    defaults = dict(MODEL_DEFAULTS[model]) if model in MODEL_DEFAULTS else pipeline_defaults(chosen)
    if chosen.get("space") == "seeds":
        defaults |= {"search_seeds": 1, "seed_share": 1.0}
    elif chosen.get("strategy", "gradient") in ("gradient", "policy"):
        space = chosen.get("space", "tokens")
        defaults |= SPACE_DEFAULTS.get(space, {}) | EMBEDDED_SPACE_DEFAULTS.get(model, {}).get(space, {})
        if chosen.get("strategy") == "policy":
            defaults |= POLICY_DEFAULTS
        if space in NOISE_SPACES:
            steps = chosen.get(
                "num_inference_steps", defaults.get("num_inference_steps", RunConfig.num_inference_steps)
            )
            defaults["grad_steps"] = steps
    else:
        defaults |= BLACK_BOX_DEFAULTS | {"scale": STATE_SCALES.get(model, 1.0)}
        defaults |= STRATEGY_DEFAULTS.get(str(chosen["strategy"]), {})
    if chosen.get("task") == "attack":  # of the prompt, not of the seed
        defaults["seed_share"] = 0.0
    if chosen.get("shared"):
        defaults |= SHARED_DEFAULTS
        defaults.pop("budget", None)
        chosen |= _split(chosen)
    if (defaults | chosen).get("anchor"):
        defaults["scale"] = STATE_SCALES.get(model, 1.0)
    config = RunConfig(prompt, **(defaults | chosen))
    if config.shared and "budget" not in chosen:
        config = dataclasses.replace(config, budget=_epochs(config, EPOCHS))
    whole = isinstance(config.budget, int) and isinstance(config.search_seeds, int)
    if "search_seeds" not in chosen and whole and not config.shared:  # a small budget has fewer seeds
        config = dataclasses.replace(config, search_seeds=max(1, min(config.search_seeds, config.budget // 4)))
    if (
        "batch_size" not in chosen and whole and config.search_seeds > 0 and not config.shared
    ):  # a small budget has small batches
        room = config.budget // config.search_seeds - 1
        config = dataclasses.replace(config, batch_size=max(1, min(config.batch_size, room // 2)))
    check(config)
    return config


def title(prompts: Sequence[str]) -> str:
    """What many prompts are called."""
    return f"{len(prompts)} prompts"


def configure_each(prompts: Sequence[str], **given: Any) -> list[RunConfig]:
    """`configure` for prompts that are optimized on their own with the same settings."""
    if not prompts:
        raise BadInput("at least one prompt is needed.")
    return [configure(prompt, **given) for prompt in prompts]


def _split(given: dict[str, Any]) -> dict[str, Any]:
    """Training and validation prompts of shared tokens: if none are given for validation, every tenth is kept apart."""
    prompts = list(dict.fromkeys(given.get("prompts") or ()))
    if given.get("validation"):
        validation = list(dict.fromkeys(given["validation"]))
    else:
        validation = prompts[:: max(10, math.ceil(len(prompts) / MOST_VALIDATION))]
        prompts = [prompt for prompt in prompts if prompt not in validation]
    if not prompts or not validation:
        raise BadInput(
            f"shared tokens need prompts to train on and others to validate on, but got {len(prompts)} and "
            f"{len(validation)}."
        )
    both = sorted(set(prompts) & set(validation))
    if both:
        raise BadInput(f"no prompt may be trained on and validated on, but got {both[0]!r} in both.")
    return {"prompts": prompts, "validation": validation}


def _epochs(config: RunConfig, epochs: int) -> int:
    """Images of that many epochs of shared tokens, validations included."""
    updates = math.ceil(len(config.prompts) / config.prompt_batch) * epochs
    validations = 1 + math.ceil(updates / config.epoch_updates)
    return updates * config.prompt_batch * config.batch_size + validations * len(config.validation)


def _whole(config: RunConfig, **least: int) -> None:
    for name, low in least.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise BadInput(f"`{name} >= {low}` must hold for a whole number, but got {name}={value!r}.")


def check(config: RunConfig) -> ModelSource:
    """Raises BadInput unless the configuration can run; returns the resolved model."""
    from ipgo_opt.rewards.base import prepare, shown

    if not isinstance(config.prompt, str) or not config.prompt.strip():
        raise BadInput(f"the prompt must not be empty, but got {config.prompt!r}.")
    _whole(
        config, budget=1, seed=0, search_seeds=1, held_out=0, num_inference_steps=1, height=0, width=0, grad_steps=1,
        lv_samples=0, prefix=0, suffix=0, basis_size=1, rank=1, decay_every=1, inner_updates=1, batch_size=1, chunk=1,
        patience=0, prompt_batch=1, validate_every=0, llm_calls=1,
    )  # fmt: skip
    for name in (
        "guidance_scale",
        "true_cfg_scale",
        "seed_share",
        "eta",
        "gamma",
        "noise_weight",
        "noise_unit",
        "clip_range",
        "scale",
        "spread",
        "learning_rate",
        "decay",
        "max_grad_norm",
        "judge_tolerance",
        "similarity_floor",
        "shortcut_start",
        "llm_timeout",
    ):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise BadInput(f"`{name} >= 0` must hold for a finite number, but got {name}={value!r}.")
    for name in ("seed_share", "eta"):
        if getattr(config, name) > 1:
            raise BadInput(f"`0 <= {name} <= 1` must hold, but got {name}={getattr(config, name)}.")
    if config.seed + config.used_seeds > FIRST_HELD_OUT_SEED:
        raise BadInput(
            f"search seeds must be below {FIRST_HELD_OUT_SEED} (later ones are held out), but got "
            f"seed={config.seed} and {config.used_seeds} seeds to try."
        )
    step = config.search_seeds * config.batch_size * (config.seed_share < 1)
    if config.shared:
        check_shared(config)
    elif config.budget < config.tried_seeds + step:
        raise BadInput(
            f"budget must pay for the raw prompt on {config.tried_seeds} seeds and one step, "
            f"{config.tried_seeds + step} images, but got budget={config.budget}."
        )
    if config.grad_steps > config.num_inference_steps:
        raise BadInput(
            f"`grad_steps <= num_inference_steps` must hold, but got grad_steps={config.grad_steps}, "
            f"num_inference_steps={config.num_inference_steps}."
        )
    SPACES.check(config.space)
    STRATEGIES.check(config.strategy)
    check_pair(config.space, config.strategy)
    if config.strategy == "gradient" and config.batch_size > 1:
        raise BadInput(
            f"the gradient strategy follows one candidate (`batch_size == 1`), but got batch_size={config.batch_size}; "
            "more images per update: search_seeds."
        )
    check_method(config)
    named = not config.reward.startswith("object:")  # otherwise it was passed to ipgo_opt.optimize as an object
    embedded = config.model in EMBEDDED
    reward = prepare(config.reward, embedded) if named else None
    if reward is not None and config.strategy in CLIMBERS and not reward.differentiable:
        raise BadInput(
            f"strategy {config.strategy!r} needs a differentiable reward, but {shown(config.reward)} is not."
        )
    judge = check_judge(config.judge, config.reward, embedded)
    config.token_shape().check()
    if config.strategy != "gradient" and "value" not in config.kept_constraints():
        raise BadInput(f"a black box needs the value constraint, but got constraints={config.constraints!r}.")
    check_basis(config)
    config.gradient_options()
    check_texts(config)
    check_device(config.device, config.dtype)
    config.memory_levers()
    source = config.model_source()
    if source.class_name is not None:
        interface = pipeline_interface(source.class_name)
        interface.check_guidance(config.negative_prompt, config.true_cfg_scale)
        interface.check_eta(config.eta)
    strangers = [] if reward is None else reward.strangers
    strangers += judge
    if strangers:
        raise BadInput(f"{strangers[0]!r} knows the embedded model's world only, but got model={config.model!r}.")
    if config.space == "seeds" and config.seed_share != 1:
        raise BadInput(f"the space of seeds has nothing else to search, but got seed_share={config.seed_share}, not 1.")
    if config.scheduler:
        import diffusers

        if not hasattr(getattr(diffusers, config.scheduler, None), "set_timesteps"):
            raise BadInput(f"scheduler must be a scheduler class of diffusers, but got {config.scheduler!r}.")
    return source


def check_shared(config: RunConfig) -> None:
    """Raises BadInput unless shared tokens can be trained as configured."""
    if config.space == "seeds":
        raise BadInput("the space of seeds has nothing that prompts could share.")
    if config.strategy == "policy":
        raise BadInput("a policy is searched for one prompt, not shared by several.")
    if SPACES.load(config.space).one_prompt:
        raise BadInput(f"the space {config.space!r} is made for one prompt, so that several can't share what it finds.")
    if config.search_seeds != 1 or config.seed_share:
        raise BadInput(
            f"shared tokens see each prompt on a seed of its own (search_seeds 1, seed_share 0), but got "
            f"search_seeds={config.search_seeds}, seed_share={config.seed_share}."
        )
    if "update" not in config.schedule:
        least = 2 * len(config.validation) + config.prompt_batch * config.batch_size
        raise BadInput(
            f"budget must pay for two validations and one update, {least} images, but got budget={config.budget}."
        )
    if config.seed + config.budget > FIRST_VALIDATION_SEED:
        raise BadInput(
            f"training seeds must be below {FIRST_VALIDATION_SEED}, but got seed={config.seed} and "
            f"budget={config.budget}."
        )


def check_method(config: RunConfig) -> None:
    """Raises BadInput unless space, strategy and sampler go together."""
    space, strategy, steps = config.space, config.strategy, config.num_inference_steps
    if strategy not in GRADIENT_STRATEGIES and not SPACES.load(space).bounded:
        raise BadInput(
            f"the space {space!r} has no bounds, so it needs a strategy with a gradient "
            f"({', '.join(GRADIENT_STRATEGIES)}), but got strategy={strategy!r}."
        )
    if space in NOISE_SPACES and strategy == "gradient" and config.grad_steps != steps:
        raise BadInput(
            f"the gradient reaches the noise through all steps (`grad_steps == num_inference_steps`), but got "
            f"grad_steps={config.grad_steps}, num_inference_steps={steps}."
        )
    if space == "lora" and not config.layer_names():
        raise BadInput(f"lora_targets must name layers, but got {config.lora_targets!r}.")
    if config.lv_samples and (strategy != "gradient" or config.grad_steps != 1 or steps < 2):
        raise BadInput(
            f"lv_samples is for the gradient of the last of two steps or more (strategy gradient, grad_steps 1), but "
            f"got lv_samples={config.lv_samples}, strategy={strategy!r}, grad_steps={config.grad_steps}, "
            f"num_inference_steps={steps}."
        )
    if config.eta > 0 and config.scheduler != "DDIMScheduler":
        raise BadInput(f"eta > 0 needs the scheduler DDIMScheduler, but got scheduler={config.scheduler!r}.")
    if strategy != "policy":
        return
    if space in (*NOISE_SPACES, "seeds"):
        raise BadInput(f"a policy gradient needs a space that changes how steps are taken, but got space={space!r}.")
    if config.eta == 0 or config.batch_size < 2 or config.search_seeds != 1 or config.clip_range == 0:
        raise BadInput(
            "the policy strategy samples with fresh noise, a batch at a time, one seed each (`eta > 0`, "
            f"`batch_size >= 2`, `search_seeds == 1`, `clip_range > 0`), but got eta={config.eta}, "
            f"batch_size={config.batch_size}, search_seeds={config.search_seeds}, clip_range={config.clip_range}."
        )


def check_pair(space: str, strategy: str) -> None:
    """Raises BadInput for a space and a strategy that do not go together."""
    known = f"{strategy.partition(':')[0]}:NAME" if ":" in strategy else strategy
    strategies, spaces = STRATEGIES_OF.get(space, (known,)), SPACES_OF.get(strategy, (space,))
    if known not in strategies:
        raise BadInput(f"the space of {space} is searched by {', '.join(strategies)}, but got strategy={strategy!r}.")
    if space not in spaces:
        raise BadInput(
            f"the strategy {strategy!r} searches the space of {' or '.join(spaces)}, but got space={space!r}."
        )


def check_texts(config: RunConfig) -> None:
    """Raises BadInput unless what the spaces of words and texts need is there: lists, endpoints, weights."""
    if config.task not in TASKS:
        raise BadInput(f"task must be one of {', '.join(TASKS)}, but got {config.task!r}.")
    if config.task == "attack" and config.space != "words":
        raise BadInput(f"an attack exchanges words (space words), but got space={config.space!r}.")
    if config.similarity_floor > 1 or config.shortcut_start >= 1:
        raise BadInput(
            "`similarity_floor <= 1` and `shortcut_start < 1` must hold, but got "
            f"similarity_floor={config.similarity_floor}, shortcut_start={config.shortcut_start}."
        )
    if config.space == "words":
        from ipgo_opt.spaces.words import templates

        if config.word_source() != "llm":  # which is asked once, when the run has begun
            lists, attack = config.word_lists(), config.task == "attack"
            templates(config.prompt, config.negative_prompt, lists, attack=attack, reads_negative=True)
        if config.task == "attack":
            from ipgo_opt.rewards.similarity import prepare_similarity

            prepare_similarity(config.similarity, config.model in EMBEDDED)
    if config.asks:
        from ipgo_opt.llm import require_endpoint
        from ipgo_opt.strategies.llm import MODES

        require_endpoint()
        if not config.llm_model or config.llm_mode not in MODES or config.llm_timeout == 0:
            raise BadInput(
                f"`llm_model` must not be empty, `llm_mode` one of {', '.join(MODES)} and `llm_timeout > 0`, but got "
                f"llm_model={config.llm_model!r}, llm_mode={config.llm_mode!r}, llm_timeout={config.llm_timeout}."
            )
    if config.strategy == "promptist":
        from ipgo_opt.strategies import promptist

        if config.promptist in promptist.EMBEDDED and config.model not in EMBEDDED:
            raise BadInput(
                f"the language model {config.promptist!r} knows the embedded model's world only, but got "
                f"model={config.model!r}."
            )
        promptist.find_model(config.promptist, config.promptist_template)


def check_judge(judge: str, reward: str, embedded: bool) -> list[str]:
    """What of a judge knows the embedded model's world only, with another model.

    A judge is one of JUDGES or a reward that is not optimized; BadInput for anything else, and for missing weights.
    """
    from ipgo_opt.rewards import JUDGES
    from ipgo_opt.rewards.base import parse, prepare

    if judge == "none":
        return []
    if judge in JUDGES:
        return [] if embedded else [judge]
    try:
        terms = parse(judge)
    except BadInput:
        raise unknown("judge", judge, [*JUDGES, "the name of a reward"]) from None
    if not reward.startswith("object:") and {term.name for term in terms} & {term.name for term in parse(reward)}:
        raise BadInput(f"the judge must be held out of the reward, but got judge={judge!r}, reward={reward!r}.")
    return prepare(judge, embedded).strangers


def check_basis(config: RunConfig) -> None:
    """Raises BadInput unless `basis` is a name or the folder of a finished token run on the same model."""
    from ipgo_opt.store import read_best

    if config.basis in BASES:
        return
    if not Path(config.basis, "run.json").is_file():
        raise BadInput(f"basis must be {', '.join(BASES)} or the folder of a finished run, but got {config.basis!r}.")
    model = read_best(Path(config.basis))[1].get("model")
    if model != config.model:
        raise BadInput(f"the run that `basis` names must be on the model {config.model!r}, but it is on {model!r}.")


def check_device(device: str, dtype: str) -> tuple[str, str]:
    """The device and dtype that "auto" stands for; BadInput for what this machine does not have."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise BadInput(f"device must be auto, cpu, cuda or mps, but got {device!r}.") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in available:
        raise BadInput(f"device must be auto, cpu, cuda or mps, but got {device!r}.")
    if not available[kind]:
        raise BadInput(f"device {device!r} was asked for, but this machine has no usable {kind}.")
    if dtype == "auto":
        dtype = "float32" if kind == "cpu" else "float16"
    if dtype not in DTYPES:
        raise BadInput(f"dtype must be auto, {', '.join(DTYPES)}, but got {dtype!r}.")
    if kind == "cpu" and dtype == "float16":
        raise BadInput("dtype float16 does not run on the CPU; use float32 or bfloat16.")
    return device, dtype

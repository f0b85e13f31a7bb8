"""Stage `promptist`: the rewriter of `--strategy promptist` for the embedded world, trained as Promptist was.

    python -m training.promptist

Hao et al. (NeurIPS 2023) fine-tune GPT-2 on pairs of a bare and an elaborate prompt, then by PPO on what the images are
worth, with a penalty on the distance to the fine-tuned model. Here a GPT-2 of three layers begins from nothing: pairs
are a scene's bare caption and a fuller one, and a rewrite y of a prompt x is worth, in the paper's form,

    min(4 (clip(x, image of y) − 0.74), 0) + aesthetic(image of y) − aesthetic(image of x),

where 4 and 0.74 stand for the paper's 20 and 0.28: 0.74 is the mean of raw images, and cosines of this `clip` lie about
five times as far apart (with 20, to leave a prompt alone is best). Both images come from the same noise. Scenes that
`training.world.held_out` keeps from training, and with them the prompt sets, are not seen here either. Runs after
`export`, on the model of the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.config import RunConfig, configure
from ipgo_opt.models import load_pipeline, make_sampler
from ipgo_opt.rewards.base import prepare
from ipgo_opt.strategies.promptist import EMBEDDED
from training.checkpoint import WORK, Progress, cosine
from training.descent import descend
from training.world import Scene, article, place, sample_scene, shows_background, subject

END = "<|endoftext|>"
VOCABULARY, POSITIONS = 512, 96
BATCH, LEARNING_RATE = 64, 2e-3
PROMPTS, REWRITES, PASSES = 24, 8, 3
"""Of a round of PPO: prompts, rewrites of each, and passes over them."""
POLICY_RATE, CLIP_RANGE, KL_WEIGHT = 3e-4, 0.2, 0.1
WEIGHT, ALIGNED = 4.0, 0.74
STEPS, GUIDANCE = 6, 3.0
TEMPLATE = RunConfig.promptist_template


def worded(scene: Scene, rng: np.random.Generator, kept: set[str], said: int | None) -> str:
    """A caption that tells the attributes `kept` of a scene, two objects by their relation if `said` is 0 or 1."""
    text = subject(scene, size="size" in kept, relation=said)
    if "background" in kept and shows_background(scene):
        text += " " + place(scene.background)
    style = scene.style if "style" in kept else ""
    if style and rng.random() < 0.3:
        return f"{article(style)} {rng.choice(['picture', 'image'])} of {text}"
    if not style and rng.random() < 0.15:
        text = f"{rng.choice(['a picture', 'an image', 'a photo'])} of {text}"
    return ", ".join(part for part in (text, style) if part)


def pair(rng: np.random.Generator) -> tuple[str, str]:
    """A bare caption of a scene and a fuller one, which tells all that the bare one tells; most scenes have a style."""
    scene = sample_scene(rng)
    while not scene.style and rng.random() < 0.7:
        scene = sample_scene(rng)
    attributes = np.array(["size", "background", "style"])
    bare = set(attributes[rng.random(3) < (0.2, 0.6, 0.6)].tolist())
    full = bare | set(attributes[rng.random(3) < 0.7].tolist())
    said = int(rng.integers(2)) if rng.random() < 0.6 else None
    return worded(scene, rng, bare, said), worded(scene, rng, full, said)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair pieces in GPT-2's way, learned from captions in the template."""
    rng = np.random.default_rng(80)
    texts = [text for _ in range(4000) for text in pair(rng)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEMPLATE.format(prompt=text) for text in texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)


def laid_out(words: PreTrainedTokenizerFast, given: list[str], written: list[str]) -> tuple[Tensor, Tensor]:
    """Ids (B, L) of texts with what was written after them, and which of them are to be predicted (B, L)."""
    end = words.eos_token_id
    heads = words([TEMPLATE.format(prompt=text) for text in given]).input_ids
    tails = [ids + [end] for ids in words([" " + text for text in written]).input_ids]
    longest = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    ids, own = torch.full((len(heads), longest), end), torch.zeros(len(heads), longest, dtype=torch.bool)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
        own[row, len(head) : len(head) + len(tail)] = True
    return ids[:, :POSITIONS], own[:, :POSITIONS]


def log_probabilities(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    """Of each id given those before it, (B, L − 1)."""
    logits = model(input_ids=ids[:, :-1]).logits
    return -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


class Studio:
    """What the images of prompts are worth."""

    def __init__(self) -> None:
        config = configure("a fox", num_inference_steps=STEPS, guidance_scale=GUIDANCE)
        pipeline = load_pipeline(config.model_source(), "cpu", "float32", ())
        self.sampler = make_sampler(pipeline, config.sampler_settings, scheduler=config.scheduler, chunk=24)
        self.clip, self.aesthetic = (prepare(name, True).load("cpu") for name in ("clip", "aesthetic"))

    @torch.no_grad()
    def scores(self, prompts: list[str], texts: list[str], seeds: list[int]) -> tuple[Tensor, Tensor]:
        """`clip` with the prompts and the aesthetic score (B,) of images of the texts."""
        images = self.sampler.generate(Conditioning.stack([self.sampler.encode(text) for text in texts]), seeds)
        return self.clip(images, prompts), self.aesthetic(images, prompts)

    def worth(self, prompts: list[str], written: list[list[str]], seeds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What the rewrites (B, R) of prompts are worth, and how much they gain of `clip` and the aesthetic score."""
        each = len(written[0])
        asked = [prompt for prompt in prompts for _ in range(1 + each)]
        texts = [text for prompt, own in zip(prompts, written, strict=True) for text in (prompt, *own)]
        noise = [seed for seed in seeds for _ in range(1 + each)]
        clip, aesthetic = (scores.view(len(prompts), -1) for scores in self.scores(asked, texts, noise))
        relevance = (WEIGHT * (clip[:, 1:] - ALIGNED)).clamp(max=0)
        more = aesthetic[:, 1:] - aesthetic[:, :1]
        return relevance + more, clip[:, 1:] - clip[:, :1], more


def write(model: Any, words: PreTrainedTokenizerFast, prompts: list[str], count: int) -> list[list[str]]:
    """That many rewrites of each prompt, drawn; one by beam search if `count` is 1."""
    how: dict[str, Any] = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0}
    if count == 1:
        how = {"do_sample": False, "num_beams": 8, "length_penalty": -1.0}
    out = []
    for prompt in prompts:
        given = words(TEMPLATE.format(prompt=prompt), return_tensors="pt", return_token_type_ids=False)
        made = model.generate(
            **given, max_new_tokens=40, num_return_sequences=count, pad_token_id=words.eos_token_id, **how
        )
        texts = words.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        out.append([" ".join(text.split()) or prompt for text in texts])
    return out


def fine_tune(words: PreTrainedTokenizerFast, steps: int) -> GPT2LMHeadModel:
    """A model that writes a fuller caption for a bare one, from nothing."""
    torch.manual_seed(81)
    end = words.eos_token_id
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(words), n_positions=POSITIONS, n_embd=96, n_layer=3, n_head=4, bos_token_id=end,
            eos_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps))
    progress = Progress("promptist-pairs", 100, model=model, optimizer=optimizer, schedule=schedule)
    while progress.step < steps:
        rng = np.random.default_rng(82_000_000 + progress.step)
        bare, full = map(list, zip(*(pair(rng) for _ in range(BATCH)), strict=True))
        ids, own = laid_out(words, bare, full)
        loss = -log_probabilities(model, ids)[own[:, 1:]].mean()
        descend(loss, model, optimizer, schedule)
        progress.tick(loss.item())
    progress.save()
    return model


def reward_tune(model: GPT2LMHeadModel, words: PreTrainedTokenizerFast, rounds: int, studio: Studio) -> None:
    """PPO on what the images are worth; a prompt's rewrites are compared with one another."""
    start = GPT2LMHeadModel(model.config)
    start.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=POLICY_RATE, weight_decay=0.0)
    progress = Progress("promptist-ppo", 1, model=model, optimizer=optimizer)
    while progress.step < rounds:
        seed = 83_000_000 + progress.step
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        prompts = [pair(rng)[0] for _ in range(PROMPTS)]
        written = write(model, words, prompts, REWRITES)
        worth, clip, more = studio.worth(prompts, written, rng.integers(2**31, size=PROMPTS).tolist())
        ids, own = laid_out(words, [p for p in prompts for _ in range(REWRITES)], [t for own in written for t in own])
        mask = own[:, 1:]
        with torch.no_grad():
            old, reference = log_probabilities(model, ids), log_probabilities(start, ids)
        value = worth - KL_WEIGHT * ((old - reference) * mask).sum(1).view_as(worth)
        advantage = value - value.mean(1, keepdim=True)
        advantage = (advantage / advantage.std()).flatten()[:, None]
        for _ in range(PASSES):
            ratio = (log_probabilities(model, ids) - old).exp()
            clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
            loss = -torch.minimum(ratio * advantage, clipped * advantage)[mask].mean()
            descend(loss, model, optimizer)
        print(
            f"worth {worth.mean():+.3f}, clip {clip.mean():+.4f}, aesthetic {more.mean():+.3f}; {prompts[0]!r} becomes "
            f"{written[0][int(worth[0].argmax())]!r}",
            flush=True,
        )
        progress.tick(-worth.mean().item())


def main() -> None:
    """Trains, reports what the first beam gains on scenes of its own, and writes the folder into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="updates on pairs")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of PPO")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=EMBEDDED["emoji"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    WORK.mkdir(parents=True, exist_ok=True)
    words = train_tokenizer()
    model, studio = fine_tune(words, args.steps), Studio()
    rng = np.random.default_rng(84)
    prompts = [pair(rng)[0] for _ in range(100)]
    seeds = rng.integers(2**31, size=100).tolist()
    for stage in ("pairs", "PPO"):
        if stage == "PPO":
            reward_tune(model, words, args.rounds, studio)
        written = write(model.eval(), words, prompts, 1)
        _, clip, more = studio.worth(prompts, written, seeds)
        print(f"after {stage}, first beam of 100 prompts: clip {clip.mean():+.4f}, aesthetic {more.mean():+.3f}")
    model.half().save_pretrained(args.out)
    words.save_pretrained(args.out)
    print(f"{sum(path.stat().st_size for path in args.out.iterdir()) / 2**20:.2f} MiB in {args.out}")


if __name__ == "__main__":
    main()

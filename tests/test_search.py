"""What a run searches: the seed first where the budget says so, then coordinates in a chosen subspace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
import worker

from ipgo_opt import BadInput, Result, optimize
from ipgo_opt.config import configure
from ipgo_opt.spaces.directions import learned, principal
from ipgo_opt.spaces.tokens import TokenShape, TokenSpace, orthonormal
from ipgo_opt.store import read_best


def run(folder: Path, **changed: Any) -> Result:
    settings: dict[str, Any] = {**tiny.RUN, "strategy": "random", "held_out": 0, "seed": 2} | changed
    return optimize("a fox", reward=tiny.Redness(), model=str(folder), **settings)


@pytest.mark.parametrize(
    ("settings", "tried"),
    [
        ({"budget": 12, "seed_share": 0.5}, 6),
        ({"budget": 12, "seed_share": 0.5, "chunk": 4}, 6),
        ({"budget": 13, "seed_share": 0.4, "search_seeds": 2, "chunk": 3}, 5),
        ({"budget": 12, "seed_share": 0.01}, 1),
        ({"budget": 9, "space": "seeds", "seed_share": 1.0}, 9),
        ({"budget": 12, "seed_share": 0.5, "strategy": "gradient"}, 6),
    ],
    ids=str,
)
def test_the_best_seeds_of_the_share_are_searched_on(tiny_folder, tmp_path, settings, tried):
    """The raw prompt on the first seeds, the best of them chosen by score, all counted in the budget."""
    result = run(tiny_folder, out=tmp_path / "run", **settings)
    first = [record for record in result.history if record["evaluation"] == 0]
    assert [record["seed"] for record in first] == list(range(2, 2 + tried))
    assert result.history[:tried] == first
    S = settings.get("search_seeds", 1)
    scores = {record["seed"]: record["reward"] for record in first}
    chosen = sorted(scores, key=lambda seed: -scores[seed])[:S]
    assert result.summary["seeds"] == chosen
    assert result.summary["seed_reward"] == pytest.approx(np.mean([scores[seed] for seed in chosen]))
    assert result.raw_reward == pytest.approx(np.mean([scores[seed] for seed in range(2, 2 + S)]))
    later = result.history[tried:]
    assert [record["seed"] for record in later] == chosen * (len(later) // S)
    assert result.summary["images"] == len(result.history) <= settings["budget"]
    assert len(later) > 0 or settings.get("space") == "seeds"
    assert result.reward >= result.summary["seed_reward"] >= result.raw_reward
    assert first[-1]["best"] == pytest.approx(result.summary["seed_reward"])


def test_best_of_n_is_the_raw_prompt_on_its_best_seed(tiny_folder, tmp_path):
    """best.png is what diffusers makes of the prompt with the seed that the result names."""
    result = run(tiny_folder, out=tmp_path / "run", space="seeds", budget=9, seed_share=1.0, chunk=4)
    (seed,) = result.summary["seeds"]
    assert seed != 2  # else the test would show nothing
    plain = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    generator = torch.Generator("cpu").manual_seed(seed)
    made = plain("a fox", generator=generator, num_inference_steps=3, guidance_scale=3.0).images[0]
    assert np.abs(np.asarray(made).astype(int) - np.asarray(result.image).astype(int)).max() <= 1  # other batches
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    with pytest.raises(BadInput, match="found no tokens"):
        read_best(tmp_path / "run")


def test_a_run_killed_while_it_tries_seeds_ends_as_if_it_had_not_been(tiny_folder, tmp_path):
    """Killed at each checkpoint in turn, chunks of two seeds and a batch of two candidates."""
    settings = tiny.RUN | {"budget": 12, "seed_share": 0.5, "chunk": 2, "strategy": "random", "batch_size": 2}
    assert worker.end(worker.start(worker.go, str(tiny_folder), str(tmp_path / "expected"), settings)) == 0
    out = tmp_path / "killed"
    for _ in range(5):
        process = worker.start(worker.go, str(tiny_folder), str(out), settings, "checkpoint.safetensors", 2)
        assert worker.end(process) == -9
    assert worker.end(worker.start(worker.go, str(tiny_folder), str(out), settings)) == 0
    assert worker.history(out) == worker.history(tmp_path / "expected")
    assert worker.result(out) == worker.result(tmp_path / "expected")
    assert (out / "best.png").read_bytes() == (tmp_path / "expected" / "best.png").read_bytes()


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"seed_share": 1.5}, "seed_share=1.5"),
        ({"seed_share": -0.1}, "seed_share=-0.1"),
        ({"seed_share": 0.9, "budget": 10, "batch_size": 4}, "budget=10"),
        ({"space": "seeds", "strategy": "gradient"}, "strategy='gradient'"),
        ({"space": "seeds", "seed_share": 0.5}, "seed_share=0.5"),
        ({"basis": "nowhere"}, "'nowhere'"),
        ({"seed": 9_999_999, "strategy": "random"}, "9999999"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(settings, shown):
    with pytest.raises(BadInput) as refused:
        configure("a fox", **settings)
    assert shown in str(refused.value)


def test_principal_directions_are_those_of_the_second_moment():
    """Against numpy's eigenvectors of XᵀX, up to their signs."""
    states = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 1
    values, vectors = np.linalg.eigh((states.double().T @ states.double()).numpy())
    expected = vectors[:, np.argsort(-values)[:3]]
    found = principal(states, 3).numpy()
    assert np.abs((found * expected).sum(0)) == pytest.approx(np.ones(3), abs=1e-5)


@pytest.mark.parametrize("layout", ["shared", "per_token"])
def test_a_basis_begins_with_the_directions_it_is_given(layout):
    """E is orthonormal, its first k columns span the first k directions, and both sides have their own."""
    generator = torch.Generator().manual_seed(1)
    given = {side: torch.randn(16, 8, generator=generator) for side in ("prefix", "suffix")}
    space = TokenSpace(16, TokenShape(2, 1, 3, layout), 0, given)
    E = space.bases(space.coordinates(full=True).start[None])
    for side, directions in given.items():
        columns = E[side].shape[-1]
        assert torch.allclose(E[side][0], orthonormal(directions[:, :columns]), atol=1e-5)
        for k in range(1, columns + 1):
            Q = E[side][0][:, :k]
            assert torch.allclose(Q @ (Q.T @ directions[:, :k]), directions[:, :k], atol=1e-4)
    with pytest.raises(BadInput, match="needs 12 directions"):
        TokenSpace(16, TokenShape(1, 1, 12), 0, given)


def test_states_of_words_are_those_of_the_encoder():
    """As many as asked for, spread over the vocabulary, none of them the state of a begin, end or padding token."""
    sampler = tiny.sampler()
    few, many = sampler.word_states(20), sampler.word_states(200)
    assert few.shape == (20, tiny.WIDTH)
    assert 20 < len(many) <= 200
    special = sampler.encode("").prompt_embeds[0]
    assert (many[:, None] - special[None]).norm(dim=-1).min() > 1e-3


def test_a_run_searches_in_what_another_one_learned(tiny_folder, tmp_path):
    """The first directions span the learned tokens, so that some Z reaches each of them up to its size."""
    first = run(tiny_folder, out=tmp_path / "first", strategy="gradient", budget=8)
    assert first.reward > first.raw_reward
    tensors, _ = read_best(tmp_path / "first")
    second = run(tiny_folder, out=tmp_path / "second", budget=4, basis=str(tmp_path / "first"))
    assert len(second.history) == 4
    given = learned(tensors["prefix"], tensors["basis.prefix"])
    assert given.shape == (tiny.WIDTH, 2 + 4)
    space = TokenSpace(tiny.WIDTH, TokenShape(2, 2, 4), 0, {"prefix": given, "suffix": given})
    E = space.bases(space.coordinates(full=True).start[None])["prefix"][0]
    V = tensors["prefix"].T
    assert torch.allclose(E @ (E.T @ V), V, atol=1e-5)
    with pytest.raises(BadInput, match="on the model"):
        configure("a fox", model="emoji", basis=str(tmp_path / "first"))

"""The benchmark of full-size steps measures what it says, on the smallest pipeline that it can build."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))  # behind the installed package
from benchmarks import full_size
from ipgo_opt.models import memory
from ipgo_opt.models.sampler import Sampler, SamplerSettings

ROOT = Path(__file__).parent.parent
SIDE, STEPS = 64, 2


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    size = full_size.SIZES["quick"]
    torch.manual_seed(0)
    pipeline = memory.pull(full_size.build(size, torch.float32), "cpu", ())
    made = Sampler(pipeline, SamplerSettings(STEPS, full_size.GUIDANCE, SIDE, SIDE))
    made.__dict__["_heard"], made.__dict__["_packing"] = full_size._known(size)
    return made


def test_the_bare_loop_computes_the_same_gradient(sampler):
    """So it is a floor, and the notebook's way is no other computation: K = 1 in all three."""
    size = full_size.SIZES["quick"]
    given = full_size.conditioning(size, "cpu", torch.float32)
    torch.manual_seed(1)
    reward = full_size.Sight(size.vision, "cpu")
    slopes = []
    for detach in (False, True):
        tokens = torch.zeros(1, 2, given.prompt_embeds.shape[-1], requires_grad=True)
        full_size.bare_step(sampler, given, lambda tokens=tokens: tokens, reward, detach)
        slopes.append(tokens.grad)
    tokens = torch.zeros(1, 2, given.prompt_embeds.shape[-1], requires_grad=True)
    score = reward(sampler.generate(given.insert(tokens, None), [0], gradient=True)).sum()
    slopes.append(torch.autograd.grad(score, tokens)[0])
    assert slopes[0].abs().max() > 0
    for slope in slopes[1:]:
        torch.testing.assert_close(slope, slopes[0], rtol=1e-3, atol=1e-4 * slopes[0].abs().max().item())


def test_it_runs_in_one_command(tmp_path):
    line = [sys.executable, "-m", "benchmarks.full_size", "--quick", "--device", "cpu", "--repeats", "1"]
    line += ["--steps", str(STEPS), "--side", str(SIDE), "--ways", "floor", "--out", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "quick-cpu.json").read_text())
    assert [row["way"] for row in found["rows"]] == ["floor"]
    assert all(row["seconds"] > 0 and row["peak_gib"] > row["weights_gib"] for row in found["rows"])
    table = (tmp_path / "quick-cpu.md").read_text()
    assert table in done.stdout
    assert "| floor |" in table

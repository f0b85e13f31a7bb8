"""What is particular to Bayesian optimization and to Nevergrad; the common contract is in test_strategies.py."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.registry import unknown
from ipgo_opt.store import Store
from ipgo_opt.strategies import STRATEGIES
from ipgo_opt.strategies.base import Problem
from ipgo_opt.strategies.bayes import GLOBAL_DIMENSIONS, Bayes, BayesOptions, Region
from ipgo_opt.strategies.nevergrad import SIGMA, Cma, named

CHEAP = BayesOptions(candidates=200, raw=32, restarts=2, climb=8, fit=15)
FAMILY = [
    "DE",
    "TwoPointsDE",
    "OnePlusOne",
    "TBPSA",
    "PSO",
    "CMA",
    "ScrHammersleySearch",
    "DiscreteLenglerOnePlusOne",
]


def problem(dimensions: int, budget: int = 60, batch: int = 1, seed: int = 0) -> Problem:
    """Starts near the middle of [−1, 1]^D."""
    one = torch.ones(dimensions)
    return Problem(0.2 * one, -one, one, budget=budget, batch=batch, seed=seed)


def embedded(x: Tensor) -> Tensor:
    """Values (q,) of points (q, D): a smooth bowl in four directions of the space, zero at its top."""
    basis = torch.linalg.qr(torch.randn(x.shape[1], 4, generator=torch.Generator().manual_seed(5))).Q
    return -(x @ basis - torch.tensor([2.0, -2.0, 1.5, -1.5])[: basis.shape[1]]).square().sum(1)


def search(solver: Any, rounds: int) -> list[Tensor]:
    """The points asked in `rounds` rounds on `embedded`."""
    asked = []
    for _ in range(rounds):
        asked.append(solver.ask())
        solver.tell(asked[-1], embedded(asked[-1]))
    return asked


def best(solver: Any, rounds: int) -> float:
    return float(torch.cat([embedded(x) for x in search(solver, rounds)]).max())


# Better than chance


@pytest.mark.parametrize(
    ("name", "options", "budget"),
    [
        ("bayes", [CHEAP], 60),
        ("bayes", [BayesOptions(trust_region=False, raw=32, restarts=2, climb=8, fit=15)], 60),
        ("cma", [], 120),
    ],
    ids=["trust-region", "whole-box", "cma"],
)
def test_beats_random_search_in_24_dimensions(name, options, budget):
    """At as many points, for every seed, at most two thirds of the distance to the top that random search leaves."""
    for seed in range(2):
        given = problem(24, budget, batch=5, seed=seed)
        chance = best(STRATEGIES.load("random")(given), budget // 5)
        assert best(STRATEGIES.load(name)(given, *options), budget // 5) > 2 / 3 * chance


# Bayesian optimization: the rules


def test_a_trust_region_is_for_many_dimensions():
    few, many = (Bayes(problem(d)) for d in (GLOBAL_DIMENSIONS, GLOBAL_DIMENSIONS + 1))
    assert not few.local
    assert many.local
    assert Bayes(problem(3), BayesOptions(trust_region=True)).local
    assert not Bayes(problem(90), BayesOptions(trust_region=False)).local


@pytest.mark.parametrize(
    ("dimensions", "budget", "batch", "size"),
    [(40, 100, 1, 20), (40, 100, 30, 30), (4, 100, 1, 8), (40, 3, 1, 2), (200, 500, 4, 100)],
)
def test_the_design_is_a_fifth_of_the_budget(dimensions, budget, batch, size):
    """Unless 2 D is less, or a batch or 2 is more."""
    assert Bayes(problem(dimensions, budget, batch)).design_size == size


@pytest.mark.parametrize("local", [True, False], ids=["trust-region", "whole-box"])
def test_the_design_is_uniform_where_the_search_begins(local):
    """Sobol points fill the first region around the start, or the whole box, and do not repeat in later batches."""
    solver = Bayes(problem(6, 4000, 100), BayesOptions(trust_region=local, design=400))
    unit = torch.cat([(solver.ask()[1:] + 1) / 2 for _ in range(4)])
    lower, upper = (0.6 - 0.4, 1.0) if local else (0.0, 1.0)
    assert unit.min() >= lower - 1e-6
    assert unit.max() <= upper + 1e-6
    assert (unit.mean(0) - (lower + upper) / 2).abs().max() < 0.01
    assert (unit.std(0) - (upper - lower) / 12**0.5).abs().max() < 0.01
    assert len(unit.unique(dim=0)) == len(unit)


def test_the_region_follows_the_paper():
    """Three improvements in a row double the length up to 1.6, `patience` failures in a row halve it."""
    region, before = Region(patience=2), torch.tensor([0.0, 1.0])  # improvements are above 1 + 1e-3 · 0.5
    lengths = []
    for value in [1.1, 1.1, 1.0, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.0, 1.0004, 0.0, 1.1, 0.0, 0.0]:
        region.learn(before, torch.tensor([-5.0, value]))
        lengths.append(region.length)
    assert lengths == [0.8] * 5 + [1.6] * 5 + [0.8] * 3 + [0.8, 0.4]


def test_the_box_is_longer_where_the_lengthscale_is():
    """Sides in proportion to the lengthscales, volume length^D, cut off at the cube."""
    center, scales = torch.tensor([0.5, 0.4, 0.95]), torch.tensor([1.0, 4.0, 2.0])
    lower, upper = Region(patience=1, length=0.2).box(center, scales)
    torch.testing.assert_close(upper - lower, torch.tensor([0.1, 0.4, 0.15]))
    torch.testing.assert_close(lower, torch.tensor([0.45, 0.2, 0.85]))
    assert upper[2] == 1.0


def test_points_stay_in_the_region():
    """After the design, each point lies in the box around the best one so far."""
    solver = Bayes(problem(24, batch=2), CHEAP)
    search(solver, 8)
    solver.region.length = 0.01
    lengthscale_ratio = 20.0  # how much longer than the region one side may be
    near = solver.x[solver.value.argmax()]
    x = (solver.ask().double() + 1) / 2
    assert ((x - near).abs().max(1).values <= 0.01 * lengthscale_ratio).all()
    assert (x != near).any(1).all()


def plateau(solver: Any, rounds: int) -> list[Tensor]:
    """The points asked while all values are equal."""
    asked = []
    for _ in range(rounds):
        asked.append(solver.ask())
        solver.tell(asked[-1], torch.full((len(asked[-1]),), 0.3))
    return asked


def test_a_region_that_is_too_small_restarts():
    """On a plateau each batch is a failure: 8 halvings from 0.8 end below 2⁻⁷, then comes a new design over the box."""
    solver = Bayes(problem(3, batch=4, budget=40), BayesOptions(trust_region=True, design=4, fit=2, candidates=50))
    assert solver.region.patience == 1
    plateau(solver, 1 + 6)
    assert (solver.region.length, solver.region.first) == (0.8 / 2**6, 0)
    plateau(solver, 1)
    assert (solver.region.length, solver.region.first) == (0.8, 32)
    again = Bayes(solver.problem, solver.options)
    again.load_state_dict(solver.state_dict())
    for _ in range(3):  # the design, and then a model of nothing but it
        x = solver.ask()
        assert torch.equal(x, again.ask())
        solver.tell(x, embedded(x)), again.tell(x, embedded(x))
    assert solver.region.first == 32


# Bayesian optimization: awkward data


@pytest.mark.parametrize("local", [True, False])
def test_equal_values_do_no_harm(local):
    """Not one of them, and no fallback either: a plateau is no failure of the model."""
    solver = Bayes(problem(5, batch=2), BayesOptions(trust_region=local, raw=16, restarts=1, climb=3, fit=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        asked = torch.cat(plateau(solver, 10))
    assert len(asked.unique(dim=0)) == len(asked)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_ill_conditioned_data_do_no_harm(local, scale):
    """One point told thirty times, its neighbours at a distance of 1e-7, and values of any size."""
    solver = Bayes(problem(5), BayesOptions(trust_region=local, raw=16, restarts=1, climb=3, fit=10))
    x = solver.ask().expand(40, -1).clone()
    x[30:] += 1e-7 * torch.arange(10)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        solver.tell(x, scale * (1 + x.sum(1)))
        for _ in range(2):
            x = solver.ask()
            assert torch.equal(x, x.clamp(-1, 1))
            solver.tell(x, scale * (1 + x.sum(1)))


def test_a_model_that_fails_says_so_and_the_search_goes_on():
    """Values whose sum overflows can't be standardized: a warning, and Sobol points."""
    one = torch.ones(3, dtype=torch.float64)
    solver = Bayes(Problem(0 * one, -one, one, budget=20, batch=2))
    while len(solver.value) < solver.design_size:
        x = solver.ask()
        solver.tell(x, 1e308 * (1.5 + 0.1 * x.sum(1)))
    with pytest.warns(RuntimeWarning, match="Gaussian process failed on 4 values.*Sobol"):
        x = solver.ask()
    assert torch.equal(x, x.clamp(-1, 1))
    assert len(x.unique(dim=0)) == 2


@pytest.mark.parametrize("name", ["bayes", "cma", "nevergrad:DE"])
def test_more_may_be_told_than_was_asked(name):
    """Points of one's own, the same one twice, and none at all; a restored solver goes on the same."""
    options = [CHEAP] if name == "bayes" else []
    solver, again = (STRATEGIES.load(name)(problem(4, 20, 2, seed), *options) for seed in (0, 1))
    for _ in range(4):
        x = solver.ask()
        own = torch.cat([x, x[:1], torch.full((2, 4), 0.9)])
        solver.tell(own, embedded(own))
        solver.tell(own[:0], embedded(own[:0]))
    again.load_state_dict(solver.state_dict())
    assert torch.equal(solver.ask(), again.ask())


@pytest.mark.parametrize("name", ["bayes", "cma", "nevergrad:DE"])
def test_coordinates_without_room_stay_where_they_are(name):
    lower, upper = torch.tensor([-1.0, 0.3, -1.0]), torch.tensor([1.0, 0.3, 1.0])
    given = Problem(torch.tensor([0.0, 0.3, 0.5]), lower, upper, budget=12, batch=2)
    solver = STRATEGIES.load(name)(given, *([CHEAP] if name == "bayes" else []))
    x = torch.cat(search(solver, 6))
    assert (x[:, 1] == 0.3).all()
    assert len(x[:, 0].unique()) > 6


def noisy_values(x: Tensor, seed: int) -> Tensor:
    return embedded(x) + 0.5 * torch.randn(len(x), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("local", [True, False])
def test_noisy_values(local):
    """The choice for noise beats the start as the plain one does; over the whole box it proposes other points."""
    paths = []
    for noisy in (False, True):
        options = BayesOptions(noisy=noisy, trust_region=local, candidates=100, raw=16, restarts=1, climb=4, fit=8)
        solver, asked = Bayes(problem(6, 40, 4), options), []
        for step in range(8):
            asked.append(solver.ask())
            solver.tell(asked[-1], noisy_values(asked[-1], step))
        paths.append(torch.cat(asked))
        assert embedded(paths[-1]).max() > embedded(problem(6).start[None]) / 2
    assert local or not torch.equal(*paths)


@pytest.mark.parametrize("wrong", ["candidates", "raw", "restarts", "climb", "fit", "design"])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(BadInput, match=wrong):
        BayesOptions(**{wrong: 0})


# Nevergrad


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("batch", [1, 4])
def test_a_replay_equals_the_original(name, batch, tmp_path):
    """Saved between ask and tell, to disk, into a solver with another seed: the same points for the rest."""
    solver, again = (named(name)(problem(5, 40, batch, seed)) for seed in (0, 1))
    search(solver, 5)
    open_points = solver.ask()
    store = Store(tmp_path)
    store.save_checkpoint({"strategy": solver.state_dict()})
    again.load_state_dict(store.load_checkpoint()["strategy"])
    store.close()
    for one in (solver, again):
        one.tell(open_points, embedded(open_points))
    ahead = search(solver, 4)
    assert all(torch.equal(a, b) for a, b in zip(ahead, search(again, 4), strict=True))
    assert len(torch.cat(ahead).unique(dim=0)) > 1


def test_what_was_told_out_of_order_is_repeated_in_that_order():
    """Two batches asked for, the second told first, half of the first never: restored all the same."""
    solver, again = (named("DE")(problem(5, 40, 2, seed)) for seed in (0, 1))
    for _ in range(8):
        first, second = solver.ask(), solver.ask()
        solver.tell(second, embedded(second))
        solver.tell(first[:1], embedded(first[:1]))
    again.load_state_dict(solver.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(search(solver, 6), search(again, 6), strict=True))


def test_nothing_is_drawn_from_the_global_generators():
    """Neither numpy's nor Python's, by an optimizer that does use numpy's: and nor have they a say in its points."""
    paths, states = [], []
    for seed in (4, 5):
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        states += [str(np.random.get_state()), random.getstate()]  # noqa: NPY002
        paths.append(torch.cat(search(named("LognormalDiscreteOnePlusOne")(problem(4, 40)), 20)))
        states += [str(np.random.get_state()), random.getstate()]  # noqa: NPY002
    assert torch.equal(*paths)
    assert states[:2] == states[2:4]
    assert states[4:6] == states[6:]


def test_cma_begins_at_the_best_of_a_uniform_design():
    """In few dimensions and in many, whatever the bounds: half of the budget fills the box, then steps of SIGMA."""
    for dimensions in (6, 40):
        width = torch.linspace(0.5, 4, dimensions)
        lower = torch.linspace(-1, 1, dimensions)
        solver = Cma(Problem(lower + width / 2, lower, lower + width, budget=800, batch=400))
        design = solver.ask()
        unit = (design[1:] - lower) / width
        assert (unit.mean(0) - 0.5).abs().max() < 5 * 0.29 / 20
        assert (unit.std(0) - 1 / math.sqrt(12)).abs().max() < 0.05
        center = ((unit - 0.5).abs().amax(1)).argmin()  # far enough from the bounds for its steps to be seen whole
        value = torch.zeros(400)
        value[1 + center] = 1.0
        solver.tell(design, value)
        steps = (solver.ask() - lower) / width - unit[center]
        inside = (unit[center] - 0.5).abs() < 0.5 - 2 * SIGMA
        assert inside.any()
        assert steps.mean(0)[inside].abs().max() < 5 * SIGMA / 20
        assert (steps.std(0)[inside] - SIGMA).abs().max() < 0.2 * SIGMA


def test_cma_works_in_many_dimensions():
    """Batches smaller than the population in 320 dimensions, where pycma's own choice of step size fails."""
    solver = Cma(problem(320, 60, 2))
    values = [float(embedded(x).max()) for x in search(solver, 30)]
    assert max(values) > values[0]


def test_larger_is_better():
    """What is told is what is climbed, not descended."""
    x = torch.cat(search(named("OnePlusOne")(problem(4, 80)), 80))
    assert embedded(x[-20:]).mean() > embedded(x[:20]).mean()


def test_a_name_of_nevergrad_is_checked_first():
    """With the nearest names, upper case or lower, and without a list of hundreds."""
    for check in (STRATEGIES.check, STRATEGIES.load):
        with pytest.raises(BadInput, match=r"names, but got 'tbpsaa'\. Did you mean 'TBPSA'") as caught:
            check("nevergrad:tbpsaa")
        assert len(str(caught.value)) < 200
        with pytest.raises(BadInput, match="'NAME'"):
            check("nevergrad:NAME")
        with pytest.raises(BadInput, match="Did you mean 'nevergrad:NAME'"):
            check("nevergrad")
        with pytest.raises(BadInput, match="'random:DE'"):
            check("random:DE")
    STRATEGIES.check("nevergrad:TBPSA")
    assert STRATEGIES.load("nevergrad:TBPSA")(problem(3)).name == "TBPSA"


def test_nearest_names_are_given():
    assert str(unknown("color", "gren", ["red", "green", "grey"])) == (
        "color must be one of red, green, grey, but got 'gren'. Did you mean 'green' or 'grey'?"
    )
    assert "Did you mean" not in str(unknown("color", "xyz", ["red"]))


def test_an_optimizer_that_cannot_ask_in_parallel_is_refused():
    """Before anything is asked, with Nevergrad's own words."""
    with pytest.raises(BadInput, match=r"Cobyla.*parallel"):
        named("Cobyla")(problem(3, batch=2))


def test_an_optimizer_that_fails_on_the_way_ends_the_run():
    """With its name and its own words; this one is nevergrad#1690."""
    solver = named("CMA")(problem(320, 60, 4))
    with pytest.raises(RunFailed, match=r"Nevergrad's CMA failed: RuntimeError: Mean shift samples"):
        search(solver, 15)


@pytest.mark.parametrize("module", ["nevergrad", "botorch"])
def test_names_are_listed_without_importing_solvers(module):
    code = (
        "import sys; from ipgo_opt.strategies import STRATEGIES; list(STRATEGIES.items()); STRATEGIES.check('bayes'); "
        f"print({module!r} in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

"""One contract for every strategy, on a quadratic; and the gradient strategy against torch's own Adam."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ipgo_opt.errors import BadInput
from ipgo_opt.store import Store
from ipgo_opt.strategies import STRATEGIES
from ipgo_opt.strategies.base import Problem
from ipgo_opt.strategies.bayes import BayesOptions
from ipgo_opt.strategies.evolution import Evolution, EvolutionOptions
from ipgo_opt.strategies.gradient import Gradient, GradientOptions
from ipgo_opt.strategies.hybrid import Gpo, Hybrid, HybridOptions

LOWER = torch.tensor([-1.0, -1.0, -3.0, 0.0, -1.0, -2.0])
UPPER = torch.tensor([1.0, 2.0, 3.0, 0.5, 1.0, -1.0])
BEST = torch.tensor([0.3, 1.9, -1.0, 0.1, 2.0, -1.2])
"""Where the quadratic is largest; its fifth coordinate is out of bounds."""

WITHOUT_CHANCE = {"gradient", "policy", "hybrid", "gpo"}
"""Strategies that draw no random numbers in their first eight steps."""

WRITERS = {"llm", "promptist"}
"""Strategies whose points are numbers of texts that they write: tests/test_rewriting.py."""

NAMES = [name for name in STRATEGIES if not name.endswith(":NAME") and name not in WRITERS]
NAMES += ["nevergrad:DE", "nevergrad:OnePlusOne"]
"""Every other strategy, and two members of the family that Nevergrad is."""

OPTIONS = {"bayes": [BayesOptions(candidates=50, raw=8, restarts=1, climb=2, fit=4)]}
"""Settings of strategies that would take minutes here with their own."""

every_strategy = pytest.mark.parametrize("name", NAMES)
batches = pytest.mark.parametrize("batch", [1, 3])


def problem(batch: int = 1, seed: int = 0) -> Problem:
    """Starts in a corner, far from the best point."""
    start = torch.tensor([-0.9, -0.9, 2.5, 0.45, -0.9, -1.95])
    return Problem(start, LOWER.clone(), UPPER.clone(), budget=60, batch=batch, seed=seed)


def quadratic(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gradients of −‖x − BEST‖²."""
    return -(x - BEST).square().sum(1), -2 * (x - BEST)


def make(name: str, batch: int = 1, seed: int = 0, given: Problem | None = None) -> Any:
    return STRATEGIES.load(name)(given or problem(batch, seed), *OPTIONS.get(name, []))


def tell(solver: Any, x: Tensor) -> Tensor:
    value, gradient = quadratic(x)
    solver.tell(x.clone(), value.clone(), gradient if solver.uses_gradient else None)
    return value


def steps(solver: Any, n: int) -> list[Tensor]:
    """n rounds of ask and tell; the points asked."""
    asked = []
    for _ in range(n):
        x = solver.ask()
        asked.append(x.clone())
        tell(solver, x)
    return asked


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_strategy
@batches
def test_points_keep_to_shape_and_bounds(name, batch):
    solver = make(name, batch)
    for x in steps(solver, 60 // batch):
        assert x.shape == (batch, 6)
        assert x.dtype == LOWER.dtype
        assert torch.equal(x, x.clamp(LOWER, UPPER))


@every_strategy
@batches
def test_the_start_is_the_first_point(name, batch):
    """So that a search never ends below where it began."""
    assert torch.equal(make(name, batch).ask()[0], problem().start)


@every_strategy
@batches
def test_a_seed_fixes_the_answers(name, batch):
    torch.manual_seed(1)
    first = steps(make(name, batch), 8)
    torch.manual_seed(2)  # the global generator has no say
    assert same(first, steps(make(name, batch), 8))


@every_strategy
def test_another_seed_gives_other_points(name):
    """Of every strategy that draws random numbers; one that does not says the same for all seeds."""
    first, second = steps(make(name, seed=0), 8), steps(make(name, seed=1), 8)
    assert same(first, second) == (name in WITHOUT_CHANCE)


@every_strategy
def test_it_leaves_the_global_generator_alone(name):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    steps(make(name), 8)
    assert torch.equal(torch.rand(1), expected)


@every_strategy
@batches
def test_it_improves_on_a_quadratic(name, batch):
    """The best of the budget is above the start."""
    solver = make(name, batch)
    values = torch.stack([quadratic(x)[0].max() for x in steps(solver, 60 // batch)])
    assert values.max() > quadratic(problem().start[None])[0]


@every_strategy
@batches
@pytest.mark.parametrize("told", [0, 1, 13])
def test_a_saved_solver_goes_on_the_same(name, batch, told, tmp_path):
    """Through a checkpoint on disk, into a fresh solver that was made with another seed."""
    solver, store = make(name, batch), Store(tmp_path)
    steps(solver, told)
    store.save_checkpoint({"strategy": solver.state_dict()})
    again = make(name, batch, seed=99)
    again.load_state_dict(store.load_checkpoint()["strategy"])
    store.close()
    assert same(steps(solver, 6), steps(again, 6))


@every_strategy
def test_a_state_is_a_snapshot(name):
    """Going on does not change a state that was taken, and changing a state does not change the solver."""
    solver, twin = make(name), make(name)
    steps(solver, 3), steps(twin, 3)
    taken = solver.state_dict()
    ahead = steps(solver, 4)
    solver.load_state_dict(taken)
    assert same(steps(solver, 4), ahead)
    spoiled = twin.state_dict()
    other = make(name)
    other.load_state_dict(spoiled)
    spoil(spoiled)
    assert same(steps(twin, 4), ahead)
    assert same(steps(other, 4), ahead)


def spoil(state: Any) -> None:
    """Overwrites every tensor of a state."""
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list) else []:
        if isinstance(value, Tensor):
            value.zero_()
        spoil(value)


@every_strategy
@batches
def test_nothing_given_is_changed_and_nothing_returned_is_kept(name, batch):
    """Inputs come back as they were; overwriting what was asked and told changes no later answer."""
    given = problem(batch)
    before = [tensor.clone() for tensor in (given.start, given.lower, given.upper)]
    solver, twin = make(name, given=given), make(name, batch)
    for _ in range(8):
        x, expected = solver.ask(), twin.ask()
        assert torch.equal(x, expected)
        told = x.clone(), *(tensor.clone() for tensor in quadratic(x))
        x.fill_(math.nan)
        copies = [tensor.clone() for tensor in told]
        solver.tell(*(told if solver.uses_gradient else told[:2]))
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(told, copies, strict=True))
        for tensor in told:
            tensor.fill_(math.nan)
        tell(twin, expected)
    assert all(torch.equal(a, b) for a, b in zip((given.start, given.lower, given.upper), before, strict=True))


@every_strategy
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(name, wrong):
    """And leave the solver as it was."""
    solver, twin = make(name, 3), make(name, 3)
    steps(solver, 2), steps(twin, 2)
    x = solver.ask()
    twin.ask()
    value, gradient = quadratic(x)
    with pytest.raises(BadInput, match="finite"):
        solver.tell(x, torch.tensor([value[0], wrong, value[2]]), gradient)
    tell(solver, x), tell(twin, x)
    assert same(steps(solver, 3), steps(twin, 3))


@every_strategy
def test_what_does_not_fit_is_refused(name):
    solver = make(name)
    x = solver.ask()
    value, gradient = quadratic(x)
    for wrong in (
        (x[0], value, gradient),
        (x[:, :5], value, gradient[:, :5]),
        (x, value[:0], gradient),
        (x, value[0], gradient),
    ):
        with pytest.raises(BadInput, match="tell needs"):
            solver.tell(*wrong)
    if solver.uses_gradient:
        for wrong in (None, gradient[0], gradient * math.nan):
            with pytest.raises(BadInput, match="gradient"):
                solver.tell(x, value, wrong)


@every_strategy
def test_the_name_leads_to_a_solver(name):
    solver_class = STRATEGIES.load(name)
    assert isinstance(solver_class.uses_gradient, bool)
    STRATEGIES.check(name)


def test_every_name_has_a_summary():
    assert all(entry.summary for entry in STRATEGIES.values())


@pytest.mark.parametrize(
    "change",
    [
        {"lower": UPPER + 1},
        {"upper": UPPER[:5]},
        {"start": torch.zeros(6, 1)},
        {"budget": 0},
        {"batch": 0},
    ],
)
def test_impossible_problems_are_refused(change):
    parts = {"start": LOWER, "lower": LOWER, "upper": UPPER, "budget": 1} | change
    with pytest.raises(BadInput):
        Problem(**parts)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_CHANCE])
def test_black_boxes_need_bounds(name):
    with pytest.raises(BadInput, match="finite bounds"):
        STRATEGIES.load(name)(Problem(torch.zeros(2), torch.full((2,), -math.inf), torch.ones(2), 1))


def test_random_points_are_uniform():
    """Mean and variance of every coordinate, from 3,000 points."""
    solver = STRATEGIES.load("random")(Problem(LOWER, LOWER, UPPER, budget=3001, batch=3001))
    unit = (solver.ask()[1:] - LOWER) / (UPPER - LOWER)
    assert (unit.mean(0) - 1 / 2).abs().max() < 0.03
    assert (unit.var(0) - 1 / 12).abs().max() < 0.01


def slope(x: Tensor, update: int) -> Tensor:
    """A gradient that changes with x and time; its norm is above 1 at first and below later."""
    return torch.sin(3 * x + torch.arange(x.shape[-1])) * (2.0 if update < 15 else 0.05) - 0.3 * x / (1 + update)


def by_hand(start: Tensor, lower: Tensor, upper: Tensor, options: GradientOptions, updates: int) -> list[Tensor]:
    """IPGO's training loop in torch's own words: Adam, StepLR, clip_grad_norm_, clamp."""
    x = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([x], lr=options.learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, options.decay_every, options.decay)
    visited = []
    for update in range(updates):
        visited.append(x.detach().clone())
        loss = -(slope(x.detach(), update) * x).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([x], options.max_grad_norm)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(lower, upper)
    return visited


@pytest.mark.parametrize(
    "options",
    [
        GradientOptions(),
        GradientOptions(learning_rate=0.3),
        GradientOptions(learning_rate=0.05, decay=0.5, decay_every=3, max_grad_norm=0.4),
    ],
    ids=["paper", "large", "own"],
)
@batches
def test_gradient_is_adam_as_the_paper_uses_it(options, batch):
    """Each row takes the path that Adam takes for it alone: ×0.9 every 10 updates, clipped norm, clamped."""
    start, lower, upper = (t.double() for t in (problem().start, LOWER, UPPER))
    solver = Gradient(Problem(start, lower, upper, budget=40, batch=batch), options)
    expected = by_hand(start, lower, upper, options, 40)
    for update in range(40):
        x = solver.ask()
        for row in x:
            torch.testing.assert_close(row, expected[update], rtol=0, atol=1e-6 * options.learning_rate * (1 + update))
        solver.tell(x, x.sum(1), slope(x, update))
    at_bounds = (x[0] == lower) | (x[0] == upper)
    assert at_bounds.any() == (options.learning_rate > 1e-3)  # clamping took part


def test_rows_of_a_batch_climb_on_their_own():
    """A steep row does not shorten another row's step, as a norm over the batch would."""
    options = GradientOptions(learning_rate=0.1)
    alone, pair = (Gradient(Problem(torch.zeros(2), -torch.ones(2), torch.ones(2), 9, q), options) for q in (1, 2))
    g = torch.tensor([[0.3, -0.6]])
    for _ in range(3):
        alone.tell(alone.ask(), torch.zeros(1), g)
        pair.tell(pair.ask(), torch.zeros(2), torch.cat([g, 1000 * g]))
    torch.testing.assert_close(pair.ask()[0], alone.ask()[0])


def test_the_schedule_counts_updates_across_a_restart():
    """The 11th update is 0.9 times as large as the 10th, in a solver that was loaded in between as well."""
    sizes = []
    for restart in (False, True):
        unbounded = torch.full((1,), math.inf)
        given = Problem(torch.zeros(1), -unbounded, unbounded, budget=30)
        solver, path = Gradient(given), []
        for update in range(30):
            if restart and update == 10:
                state, solver = solver.state_dict(), Gradient(given)
                solver.load_state_dict(state)
            path.append(solver.ask().item())
            solver.tell(solver.ask(), torch.zeros(1), torch.ones(1, 1))  # Adam's step is then the learning rate
        sizes.append(torch.tensor(path).diff())
    assert torch.equal(sizes[0], sizes[1])
    expected = torch.tensor([1e-3 * 0.9 ** (update // 10) for update in range(29)])
    torch.testing.assert_close(sizes[0], expected, rtol=1e-3, atol=0)


def test_gradient_must_be_told_its_own_points():
    solver = make("gradient")
    x = solver.ask() + 0.01
    with pytest.raises(BadInput, match="asked for"):
        solver.tell(x, *quadratic(x))


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"decay": 0.0},
        {"decay": 1.1},
        {"decay_every": 0},
        {"max_grad_norm": 0.0},
    ],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        GradientOptions(**wrong)


def test_names_are_checked():
    """With the nearest name as a hint."""
    with pytest.raises(BadInput, match="'gradient'"):
        STRATEGIES.load("gradeint")


# Evolution and the gradient on distributions


def choices(counts: list[int], budget: int = 100, batch: int = 1, seed: int = 0) -> Problem:
    """Numbers of choices, 0 at the start."""
    last = torch.tensor(counts, dtype=torch.float32) - 1
    return Problem(torch.zeros(len(counts)), torch.zeros(len(counts)), last, budget, batch, seed)


def separable(x: Tensor) -> Tensor:
    """Each coordinate on its own; the best choices are the last ones."""
    return x.sum(1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 4])
def test_evolution_finds_the_best_choices(seed, batch):
    """Of 4,096 points in 300 evaluations, and of 6 coordinates each mutant changes one at least."""
    solver = Evolution(choices([4] * 6, budget=300, batch=batch, seed=seed))
    asked = []
    for _ in range(300 // batch):
        x = solver.ask()
        solver.tell(x, separable(x))
        asked += [tuple(row) for row in x.tolist()]
    assert (3.0,) * 6 in asked
    assert len(set(asked)) == len(asked)  # no point is paid for twice
    assert {value for point in asked for value in point} == {0.0, 1.0, 2.0, 3.0}


def test_the_population_and_the_children():
    """20 draws, then 10 mutants and 10 crossings of the 10 best, at every coordinate a parent's or another choice."""
    solver = Evolution(choices([3] * 40, budget=200), EvolutionOptions(keep=0.0))
    population = torch.cat(steps_of(solver, 20))
    assert len(solver.made) == 20
    share = (population[1:] == 0).float().mean()
    assert 0.25 < share < 0.42  # uniform over three choices
    parents = population[population.sum(1).argsort(descending=True, stable=True)[:10]]
    children = torch.cat(steps_of(solver, 20))
    assert len(solver.made) == 40
    for mutant in children[:10]:
        assert 1 <= (mutant != parents).sum(1).min() <= 12  # 0.1 of 40, and a third of what is drawn is the same
    for crossing in children[10:]:
        assert ((crossing == parents).sum(1) >= 10).sum() >= 2
        pairs = [((crossing == a) | (crossing == b)).all() for a in parents for b in parents]
        assert any(pairs)


def steps_of(solver: Any, n: int) -> list[Tensor]:
    asked = []
    for _ in range(n):
        asked.append(solver.ask())
        solver.tell(asked[-1], separable(asked[-1]))
    return asked


def test_the_first_population_stays_near_the_start():
    solver = Evolution(choices([5] * 50, budget=100), EvolutionOptions(keep=0.8))
    drawn = torch.cat(steps_of(solver, 20))[1:]
    assert (drawn == 0).float().mean() == pytest.approx(0.8 + 0.2 / 5, abs=0.04)


GROUPS = (3, 4, 2)


def distributions(budget: int = 60, batch: int = 1) -> Problem:
    """Log-coefficients in [0, 3] of three choices, the first ones preferred."""
    start = torch.cat([torch.eye(n)[0] for n in GROUPS])
    return Problem(start, torch.zeros(9), torch.full((9,), 3.0), budget, batch, 0, GROUPS)


@pytest.mark.parametrize("batch", [1, 2])
def test_hybrid_is_rmsprop_as_the_paper_uses_it(batch):
    """torch's own, with gradients clamped to ±0.025, the mean over the batch's draws, kept in [0, 3]."""
    solver = Hybrid(distributions(batch=batch, budget=60 * batch))
    x = torch.nn.Parameter(distributions().start.clone())
    optimizer = torch.optim.RMSprop([x], lr=0.1, momentum=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert solver.uses_gradient
        asked = solver.ask()
        torch.testing.assert_close(asked, x.detach().expand(batch, -1))
        gradient = torch.randn(batch, 9, generator=generator) * 0.05
        solver.tell(asked, torch.zeros(batch), gradient)
        x.grad = -gradient.mean(0).clamp(-0.025, 0.025)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(0, 3)
    assert ((x == 0) | (x == 3)).any()  # clamping took part
    assert not solver.uses_gradient
    for learned, one in zip(solver.distribution(), x.detach().split(list(GROUPS)), strict=True):
        torch.testing.assert_close(learned, one.softmax(0))


def climbed(solver: Any, wanted: Tensor, rounds: int) -> list[Tensor]:
    """Rounds on the value x · wanted; the points asked without a gradient."""
    corners = []
    for _ in range(rounds):
        x = solver.ask()
        if solver.uses_gradient:
            solver.tell(x, x @ wanted, wanted.expand_as(x))
        else:
            corners.append(x)
            solver.tell(x, x @ wanted)
    return corners


@pytest.mark.parametrize("kind", [Hybrid, Gpo])
def test_the_second_part_begins_with_what_was_learned(kind):
    """The gradient's choices first; all points are one choice per group; none is asked twice."""
    wanted = torch.tensor([-1.0, 1, -1, -1, -1, -1, 1, -1, 1]) * 0.01
    corners = torch.cat(climbed(kind(distributions(budget=32)), wanted, 32))
    assert len(corners) == 16
    assert corners[0].tolist() == [0, 3, 0, 0, 0, 0, 3, 0, 3]
    for group in corners.split(list(GROUPS), dim=1):
        assert torch.equal((group == 3).sum(1), torch.ones(len(corners)))
    assert len({tuple(row) for row in corners.tolist()}) == len(corners)


def test_gpo_draws_from_what_was_learned():
    """Frequencies of single draws, next to the probabilities."""
    picked = torch.zeros(9)
    for seed in range(400):
        given = distributions(budget=8)
        solver = Gpo(Problem(given.start, given.lower, given.upper, 8, 1, seed, GROUPS))
        picked += climbed(solver, torch.zeros(9), 6)[1][0] / 3
    expected = torch.cat([one.softmax(0) for one in distributions().start.split(list(GROUPS))])
    first = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 0])
    alone = math.prod(float(p) for p in expected[first == 1])  # the first point itself is not drawn again
    torch.testing.assert_close(picked / 400, (expected - alone * first) / (1 - alone), rtol=0, atol=0.07)


@pytest.mark.parametrize("kind", [Hybrid, Gpo])
@pytest.mark.parametrize("rounds", [9, 15, 20])
def test_a_saved_second_part_goes_on_the_same(kind, rounds, tmp_path):
    wanted = torch.linspace(-0.02, 0.02, 9)
    solver, store = kind(distributions(budget=40), HybridOptions(iterations=10)), Store(tmp_path)
    climbed(solver, wanted, rounds)
    store.save_checkpoint({"strategy": solver.state_dict()})
    again = kind(distributions(budget=40), HybridOptions(iterations=10))
    again.load_state_dict(store.load_checkpoint()["strategy"])
    store.close()
    assert again.uses_gradient == solver.uses_gradient
    assert same(climbed(solver, wanted, 15), climbed(again, wanted, 15))


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (HybridOptions, {"iterations": 0}),
        (HybridOptions, {"momentum": 1.0}),
        (HybridOptions, {"clamp": 0.0}),
        (EvolutionOptions, {"population": 0}),
        (EvolutionOptions, {"rate": 0.0}),
        (EvolutionOptions, {"keep": 1.0}),
    ],
)
def test_impossible_options_of_searches_over_choices_are_refused(options, wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        options(**wrong)


def test_groups_add_up():
    with pytest.raises(BadInput, match="`groups` must add up to the 9 coordinates"):
        Problem(torch.zeros(9), torch.zeros(9), torch.ones(9), 1, groups=(3, 4))


def test_nesterov_is_torchs():
    """ReNO's optimizer: SGD with momentum 0.9, its own step, the clipped norm; through a restart as well."""
    start = problem().start.double()
    bound = torch.full_like(start, math.inf)
    given = Problem(start, -bound, bound, budget=40)
    options = GradientOptions(learning_rate=0.05, decay=1.0, max_grad_norm=0.1, optimizer="nesterov")
    solver, x = Gradient(given, options), torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([x], lr=0.05, momentum=0.9, nesterov=True)
    for update in range(20):
        torch.testing.assert_close(solver.ask()[0], x.detach())
        solver.tell(solver.ask(), torch.zeros(1), slope(solver.ask(), update))
        x.grad = -slope(x.detach(), update)
        torch.nn.utils.clip_grad_norm_([x], 0.1)
        optimizer.step()
        if update == 9:
            state, solver = solver.state_dict(), Gradient(given, options)
            solver.load_state_dict(state)
    assert (x - start).norm() > 0.1


def test_a_policy_averages_the_gradients_of_its_samples():
    """The update of one point with the mean gradient; other points than it asked for are refused."""
    options = GradientOptions(learning_rate=0.1)
    samples, alone = (STRATEGIES.load("policy")(problem(q), options) for q in (3, 1))
    g = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        x = samples.ask()
        assert torch.equal(x, x[:1].expand(3, -1))
        samples.tell(x, torch.zeros(3), g)
        alone.tell(alone.ask(), torch.zeros(1), g.mean(0, keepdim=True))
    torch.testing.assert_close(samples.ask()[:1], alone.ask())
    with pytest.raises(BadInput, match="one point"):
        samples.tell(samples.ask() + torch.arange(3)[:, None], torch.zeros(3), g)

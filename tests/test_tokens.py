"""The token space is the paper's equations (2), (6), (7) and (11), with its constraints, in both layouts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.errors import BadInput
from ipgo_opt.spaces.tokens import TokenShape, TokenSpace, rotate_pairs, rotate_shifted_pairs
from ipgo_opt.strategies.base import Problem
from ipgo_opt.strategies.gradient import Gradient, GradientOptions

D = 16
both_layouts = pytest.mark.parametrize("layout", ["shared", "per_token"])
both_views = pytest.mark.parametrize("full", [True, False], ids=["full", "low"])


def space(
    layout: str = "shared", prefix: int = 3, suffix: int = 2, basis: int = 5, seed: int = 0, **more
) -> TokenSpace:
    return TokenSpace(D, TokenShape(prefix, suffix, basis, layout, **more), seed)


def moved(made: TokenSpace, q: int = 1, *, full: bool, seed: int = 1) -> Tensor:
    """q points as a search reaches them: the start, moved where the tokens depend on it, within the bounds."""
    c = made.coordinates(full=full)
    x = c.start.repeat(q, 1)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        V = torch.cat(list(made.tokens(leaf, full=full).values()), 1)
        (slope,) = torch.autograd.grad(V.square().sum() + V.sum(), leaf)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(slope != 0, x + 0.5 * step, x).clamp(c.lower, c.upper)


def prompt(L: int = 4, seed: int = 2, dtype: torch.dtype = torch.float32) -> Conditioning:
    states = torch.randn(1, L, D, generator=torch.Generator().manual_seed(seed))
    return Conditioning(states.to(dtype), torch.zeros(1, L, D, dtype=dtype), {"pooled": torch.ones(1, 7)})


def rotation(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def R1(d: int, angle: float) -> np.ndarray:
    return np.kron(np.eye(d // 2), rotation(angle))


def R2(d: int, angle: float) -> np.ndarray:
    """Pairs (2,3), (4,5), …, (d,1), entry by entry."""
    R = np.zeros((d, d))
    for first in range(1, d, 2):
        rows = [first, (first + 1) % d]
        R[np.ix_(rows, rows)] = rotation(angle)
    return R


@pytest.mark.parametrize("d", [2, 4, 10])
@pytest.mark.parametrize("angle", [0.0, 0.7, -2.5, math.pi])
@pytest.mark.parametrize(("rotate", "matrix"), [(rotate_pairs, R1), (rotate_shifted_pairs, R2)], ids=["R1", "R2"])
def test_rotations_are_their_matrices(rotate, matrix, d, angle):
    v = torch.randn(2, 3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = torch.tensor([[angle, angle / 2, 0.1], [0.3, -angle, angle]], dtype=torch.float64)
    out = rotate(v, angles)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(out[i, j], matrix(d, float(angles[i, j])) @ v[i, j].numpy(), atol=1e-14)


def test_rotation_matrices_are_the_papers():
    """The last pair (d,1) wraps round; R2 is R1 with the coordinates renumbered by one; the two do not commute."""
    cos, sin = math.cos(0.5), math.sin(0.5)
    assert R2(4, 0.5).tolist() == [[cos, 0, 0, sin], [0, cos, -sin, 0], [0, sin, cos, 0], [-sin, 0, 0, cos]]
    shift = np.roll(np.eye(4), 1, axis=0)
    np.testing.assert_allclose(R2(4, 0.5), shift @ R1(4, 0.5) @ shift.T)
    assert np.abs(R1(6, 0.5) @ R2(6, 0.5) - R2(6, 0.5) @ R1(6, 0.5)).max() > 0.1


@both_layouts
def test_tokens_are_the_equation(layout):
    """V = s · R2(θ2) R1(θ1) (E Z + b), with numpy matrices cut out of the flat vector by hand."""
    made = space(layout, scale=1.7)
    x = moved(made, full=True)
    got, E = made.tokens(x, full=True), made.bases(x)
    rest = x[0].double().numpy()
    for side, M in (("prefix", 3), ("suffix", 2)):
        N, angles, biases = (5, 1, 0) if layout == "shared" else (5 * M, M, D)
        _, b, Z, theta1, theta2, rest = np.split(rest, np.cumsum([D * N, biases, N * M, angles, angles]))
        tokens = E[side][0].double().numpy() @ Z.reshape(N, M) + (b[:, None] if biases else 0)
        for j in range(M):
            k = j if angles > 1 else 0
            expected = 1.7 * R2(D, theta2[k]) @ R1(D, theta1[k]) @ tokens[:, j]
            np.testing.assert_allclose(got[side][0, j], expected, atol=1e-5)
            assert np.abs(expected).max() > 0.1
    assert len(rest) == 0


@pytest.mark.parametrize(
    ("layout", "full", "low"), [("shared", 46_684, 604), ("per_token", 468_376, 6_040)], ids=["shared", "per_token"]
)
def test_parameter_counts_of_the_paper(layout, full, low):
    """d = 768, N = 30, M = 10 + 10: equations (6, 7) literally, and table 3's count."""
    made = TokenSpace(768, TokenShape(10, 10, 30, layout))
    assert len(made.coordinates(full=True)) == full
    assert len(made.coordinates(full=False)) == low
    x = made.coordinates(full=True).start[None]
    for E in made.bases(x).values():
        assert (E[0].T @ E[0] - torch.eye(E.shape[-1])).abs().max() < 1e-5


@both_views
@both_layouts
def test_start_and_bounds(layout, full):
    """Z starts uniform within ±spread, θ at 0; Z is bounded by ±1, θ by ±π, X and the biases not at all."""
    made = space(layout, spread=0.25)
    c = made.coordinates(full=full)
    assert c.start.shape == c.lower.shape == c.upper.shape == (len(c),)
    assert torch.equal(c.lower, -c.upper)
    at = 0
    for M in (3, 2):
        N, angles, biases = (5, 1, 0) if layout == "shared" else (5 * M, M, D)
        if full:
            assert c.upper[at : at + D * N + biases].isinf().all()
            at += D * N + biases
        Z = c.start[at : at + N * M]
        assert 0.15 < Z.abs().max() <= 0.25
        assert (c.upper[at : at + N * M] == 1).all()
        at += N * M
        assert (c.start[at : at + 2 * angles] == 0).all()
        assert (c.upper[at : at + 2 * angles] == torch.tensor(math.pi)).all()
        at += 2 * angles
    assert at == len(c)


@both_layouts
def test_constraints_hold_after_every_update(layout):
    """100 updates with a large learning rate towards tokens out of reach: EᵀE = I, Z in ±1 and θ in ±π throughout."""
    made = space(layout)
    c = made.coordinates(full=True)
    solver = Gradient(Problem(c.start, c.lower, c.upper, 101), GradientOptions(learning_rate=0.5, decay=1.0))
    generator = torch.Generator().manual_seed(3)
    target = {
        name: 20 * torch.randn(V.shape, generator=generator)
        for name, V in made.tokens(c.start[None], full=True).items()
    }
    moved_at_all = torch.zeros(len(c), dtype=torch.bool)
    for update in range(101):
        x = solver.ask()
        moved_at_all |= x[0] != c.start
        for side, E in made.bases(x).items():
            deviation = (E[0].T @ E[0] - torch.eye(E.shape[-1])).abs().max()
            assert deviation < 1e-5, (update, side, deviation)
        for M, (_, coefficients) in zip((3, 2), made._split(x, True).values(), strict=True):
            angles = 1 if layout == "shared" else M
            assert coefficients[0, : -2 * angles].abs().max() <= 1
            assert coefficients[0, -2 * angles :].abs().max() <= torch.tensor(math.pi)
        leaf = x.clone().requires_grad_()
        value = -sum((V - target[name]).square().sum((1, 2)) for name, V in made.tokens(leaf, full=True).items())
        solver.tell(x, value.detach(), torch.autograd.grad(value.sum(), leaf)[0])
    bounded = c.upper.isfinite()
    assert (
        x[0, bounded].abs() == c.upper[bounded]
    ).float().mean() > 0.2  # the bounds were reached, so they were tested
    assert moved_at_all[~bounded].float().mean() > 0.5  # the bases moved


@both_layouts
def test_basis_is_orthonormal_everywhere(layout):
    """ "X is unbounded, its E is orthonormal everywhere": also where no gradient would have led."""
    made = space(layout)
    c = made.coordinates(full=True)
    generator = torch.Generator().manual_seed(4)
    for size in (1e-6, 0.1, 1.0, 100.0):
        x = c.start + size * torch.randn(3, len(c), generator=generator)
        for E in made.bases(x).values():
            assert (E.mT @ E - torch.eye(E.shape[-1])).abs().max() < 1e-5, size


def test_without_rotation_tokens_are_the_basis_times_the_coefficients():
    made = space(rotation=False, basis=4)
    x = moved(made, full=True)
    assert len(made.coordinates(full=False)) == 4 * (3 + 2)
    for side, (_, coefficients) in made._split(x, True).items():
        E = made.bases(x)[side][0]
        assert (E.T @ E - torch.eye(4)).abs().max() < 1e-5
        V = (E @ coefficients.view(4, -1)).T
        assert torch.allclose(made.tokens(x, full=True)[side][0], V, atol=1e-6)


@both_layouts
def test_without_orthonormality_every_entry_of_the_basis_is_free(layout):
    """The start is the same as with it; then E is the very matrix that the vector holds."""
    free, bound = space(layout, orthonormal=False), space(layout)
    x, y = (made.coordinates(full=True).start[None] for made in (free, bound))
    for side, V in bound.tokens(y, full=True).items():
        assert torch.allclose(free.tokens(x, full=True)[side], V, atol=1e-5)
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    basis, _ = free._split(x, True)["prefix"]
    assert torch.equal(free.bases(x)["prefix"].flatten(), basis[0, : D * free.sides["prefix"].N])


def test_without_the_value_constraint_there_are_no_bounds():
    coordinates = space(bounded=False).coordinates(full=True)
    assert coordinates.upper.isinf().all()
    assert coordinates.lower.isinf().all()


@both_views
@both_layouts
def test_every_angle_has_an_effect(layout, full):
    """Turning θ1 or θ2 moves the tokens of its side (in per_token: its own token only), and keeps their norms."""
    made = space(layout)
    x = moved(made, full=full)
    before = made.tokens(x, full=full)
    end = 0
    for side, M in (("prefix", 3), ("suffix", 2)):
        basis, coefficients = made._split(x, full)[side]
        end += (basis.shape[1] if full else 0) + coefficients.shape[1]
        angles = 1 if layout == "shared" else M
        for a in range(2 * angles):
            turned = x.clone()
            turned[0, end - 2 * angles + a] += 0.7
            after = made.tokens(turned, full=full)
            change = (after[side] - before[side])[0].norm(dim=-1)
            mine = torch.ones(M, dtype=torch.bool) if layout == "shared" else torch.arange(M) == a % angles
            assert (change[mine] > 0.1).all()
            assert (change[~mine] == 0).all()
            torch.testing.assert_close(after[side].norm(dim=-1), before[side].norm(dim=-1))
            other = "suffix" if side == "prefix" else "prefix"
            assert torch.equal(after[other], before[other])
    assert end == x.shape[1]


@both_views
@both_layouts
def test_concatenation_and_conformity(layout, full):
    """T = concat(V_pre, f(C), V_suf); p_conf against numpy; what is not a prompt embedding stays as it is."""
    made, given = space(layout), prompt()
    x = moved(made, 2, full=full)
    out, p_conf = made.apply(x, given, full=full)
    V = made.tokens(x, full=full)
    for k in range(2):
        T = np.concatenate([V["prefix"][k], given.prompt_embeds[0], V["suffix"][k]])
        np.testing.assert_array_equal(out.prompt_embeds[k], T)
        expected = ((T.mean(0) - given.prompt_embeds[0].numpy().mean(0)) ** 2).sum()
        np.testing.assert_allclose(p_conf[k], expected, rtol=1e-5)
        assert expected > 1e-3
    assert torch.equal(out.negative_prompt_embeds, given.negative_prompt_embeds.expand(2, -1, -1))
    assert torch.equal(out.extra["pooled"], given.extra["pooled"].expand(2, -1))
    assert not torch.equal(out.prompt_embeds[0], out.prompt_embeds[1])


def test_tokens_that_are_the_mean_cost_nothing():
    """The conformity penalty is 0 exactly when the inserted tokens have the prompt's mean."""
    made = space("per_token", prefix=1, suffix=0, basis=D)
    c = made.coordinates(full=True)
    given = prompt()
    x = c.start[None].clone()
    x[:, D * D + D : D * D + 2 * D] = 0  # Z
    x[:, D * D : D * D + D] = given.prompt_embeds.mean(1)  # bias
    assert made.apply(x, given, full=True)[1].item() < 1e-12
    x[:, D * D] += 1
    expected = (1 / 5) ** 2  # one of five tokens, one coordinate off by one
    assert made.apply(x, given, full=True)[1].item() == pytest.approx(expected, rel=1e-5)


@both_layouts
@pytest.mark.parametrize(("prefix", "suffix"), [(0, 2), (3, 0)])
def test_one_side_may_be_empty(layout, prefix, suffix):
    made, given = space(layout, prefix, suffix), prompt()
    for full in (True, False):
        x = moved(made, full=full)
        V = made.tokens(x, full=full)
        assert set(V) == ({"suffix"} if prefix == 0 else {"prefix"})
        parts = [given.prompt_embeds, V["suffix"]] if prefix == 0 else [V["prefix"], given.prompt_embeds]
        assert torch.equal(made.apply(x, given, full=full)[0].prompt_embeds, torch.cat(parts, 1))


@both_layouts
def test_both_views_start_at_the_same_tokens(layout):
    """A low vector is a full one with the basis of the start."""
    made = space(layout)
    full, low = (made.coordinates(full=full).start[None] for full in (True, False))
    for side, V in made.tokens(full, full=True).items():
        assert torch.equal(V, made.tokens(low, full=False)[side])
    x = moved(made, full=False)
    parts = [
        torch.cat([made.sides[side].start_basis[None], part[1]], 1) for side, part in made._split(x, False).items()
    ]
    for side, V in made.tokens(torch.cat(parts, 1), full=True).items():
        torch.testing.assert_close(V, made.tokens(x, full=False)[side])


@both_views
@both_layouts
def test_state_makes_another_space_the_same(layout, full):
    """A vector means the same tokens in any space that has loaded the state, whatever its seed was."""
    made, other = space(layout, seed=0), space(layout, seed=1)
    x = moved(made, full=full)
    assert not torch.allclose(made.tokens(x, full=full)["prefix"], other.tokens(x, full=full)["prefix"], atol=0.1)
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    other.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()  # what was loaded is a copy
    for side, V in made.tokens(x, full=full).items():
        assert torch.equal(V, other.tokens(x, full=full)[side])
    assert torch.equal(made.coordinates(full=full).start, other.coordinates(full=full).start)


@both_layouts
def test_a_seed_fixes_the_space(layout):
    """Whatever torch's global generator has been through, which is left alone."""
    torch.manual_seed(5)
    first = space(layout)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    for name, tensor in space(layout).state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])
    assert not torch.equal(space(layout, seed=1).coordinates(full=False).start, first.coordinates(full=False).start)


@both_layouts
def test_the_sides_have_bases_of_their_own(layout):
    made = space(layout, prefix=2, suffix=2)
    E = made.bases(made.coordinates(full=True).start[None])
    assert (E["prefix"] - E["suffix"]).abs().max() > 0.1


@both_views
@both_layouts
def test_a_batch_equals_one_by_one(layout, full):
    made, given = space(layout), prompt()
    x = moved(made, 3, full=full)
    out, p_conf = made.apply(x, given, full=full)
    assert len(out) == 3
    for k in range(3):
        one, p_one = made.apply(x[k : k + 1], given, full=full)
        torch.testing.assert_close(out.prompt_embeds[k : k + 1], one.prompt_embeds)
        torch.testing.assert_close(p_conf[k : k + 1], p_one)


@both_views
@both_layouts
def test_gradient_against_finite_differences(layout, full):
    """In float64, every coordinate, through tokens and penalty."""
    made = space(layout, prefix=2, suffix=1, basis=3)
    x = moved(made, 2, full=full).double()
    for side in made.sides.values():
        side.parametrization.double()
        side.start_basis = side.start_basis.double()
    w = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def objective(x: Tensor) -> Tensor:
        V = torch.cat(list(made.tokens(x, full=full).values()), 1)
        return (V * w).sum((1, 2)) + V.mean(1).square().sum(1)

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(leaf).sum(), leaf)
    h = 1e-6
    for i in range(x.shape[1]):
        step = torch.zeros_like(x)
        step[:, i] = h
        numeric = (objective(x + step) - objective(x - step)) / (2 * h)
        torch.testing.assert_close(slope[:, i], numeric, rtol=1e-6, atol=1e-7, msg=lambda text, i=i: f"{i}: {text}")
    assert slope.abs().max() > 0.1


@both_layouts
def test_gradient_of_the_penalty(layout):
    """p_conf is differentiable; its directional derivative against a difference quotient in float32."""
    made, given = space(layout), prompt()
    x = moved(made, full=False)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(made.apply(leaf, given, full=False)[1].sum(), leaf)
    step = 1e-2 * slope / slope.norm()
    rise = made.apply(x + step, given, full=False)[1] - made.apply(x - step, given, full=False)[1]
    assert (rise / 2e-2).item() == pytest.approx(slope.norm().item(), rel=2e-2)


def test_tokens_take_dtype_and_gradient_of_the_prompt():
    """Half-precision encoders get half-precision tokens; the penalty stays float32; both reach x."""
    made, given = space(), prompt(dtype=torch.bfloat16)
    x = moved(made, full=True).requires_grad_()
    out, p_conf = made.apply(x, given, full=True)
    assert out.prompt_embeds.dtype == torch.bfloat16
    assert p_conf.dtype == torch.float32
    assert torch.autograd.grad(out.prompt_embeds.float().sum(), x, retain_graph=True)[0].abs().max() > 0
    assert torch.autograd.grad(p_conf.sum(), x)[0].abs().max() > 0


@pytest.mark.parametrize(
    ("width", "shape", "rule"),
    [
        (16, {"prefix": 0, "suffix": 0}, "prefix=0, suffix=0"),
        (16, {"prefix": -1, "suffix": 2}, "prefix=-1"),
        (16, {"prefix": 2, "suffix": -1}, "suffix=-1"),
        (16, {"basis": 0}, "basis_size=0"),
        (16, {"basis": 17}, "d=16"),
        (16, {"layout": "per_token", "prefix": 1, "suffix": 5, "basis": 4}, "needs 20"),
        (16, {"layout": "free"}, "'free'"),
        (15, {}, "d=15"),
        (16, {"scale": 0.0}, "scale=0.0"),
        (16, {"scale": math.nan}, "scale=nan"),
        (16, {"scale": math.inf}, "scale=inf"),
        (16, {"spread": -0.1}, "spread=-0.1"),
        (16, {"spread": 1.5}, "spread=1.5"),
    ],
)
def test_impossible_shapes_are_refused(width, shape, rule):
    """One line that names the rule and the value."""
    with pytest.raises(BadInput, match=rule) as caught:
        TokenSpace(width, TokenShape(**({"prefix": 2, "suffix": 2, "basis": 4} | shape)))
    assert "\n" not in str(caught.value)


def test_the_widest_possible_bases_are_allowed():
    for shape in (TokenShape(2, 2, D), TokenShape(4, 2, 4, "per_token")):
        made = TokenSpace(D, shape)
        for E in made.bases(made.coordinates(full=True).start[None]).values():
            assert (E[0].T @ E[0] - torch.eye(E.shape[-1])).abs().max() < 1e-5


def attention_by_hand(V: Tensor, states: Tensor, read: list[int]) -> Tensor:
    """V + softmax(V Cᵀ / √d) C over the states that are read, token by token in float64."""
    out = V.clone()
    for j in range(len(V)):
        logits = [math.exp(float(V[j].double() @ states[k].double()) / math.sqrt(D)) for k in read]
        for weight, k in zip(logits, read, strict=True):
            out[j] += weight / sum(logits) * states[k]
    return out


@pytest.mark.parametrize("masked", [False, True])
def test_attending_tokens_are_cross_attention(masked):
    """IPGO+: by hand and by torch's own; padding is not attended to, and prompts differ in what is inserted."""
    made = space(attend=True)
    x = moved(made, 2, full=True)
    one, other = prompt(6, 2), prompt(6, 3)
    states = torch.cat([one.prompt_embeds, other.prompt_embeds] * 2)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]] * 2) if masked else None
    T, _ = made.apply(x, Conditioning(states, mask=mask), full=True)
    V = made.tokens(x, full=True)
    for row in range(4):
        read = list(range(4 if masked and row % 2 == 0 else 6))
        expected = attention_by_hand(V["prefix"][row // 2], states[row], read)
        assert torch.allclose(T.prompt_embeds[row, :3], expected, atol=1e-5)
        allowed = None if mask is None else (mask[row] != 0).expand(3, -1)
        torchs = torch.nn.functional.scaled_dot_product_attention(
            V["prefix"][row // 2][None], states[row][None], states[row][None], allowed
        )
        assert torch.allclose(T.prompt_embeds[row, :3], V["prefix"][row // 2] + torchs[0], atol=1e-5)
    assert (T.prompt_embeds[0, :3] - T.prompt_embeds[1, :3]).abs().max() > 0.01


@pytest.mark.parametrize("masked", [False, True])
def test_anchored_tokens_stand_on_the_mean_of_what_is_read(masked):
    """V + mean state, by hand, per prompt; without anything learned the conformity penalty is 0."""
    made = space(anchor=True)
    x = moved(made, 2, full=True)
    states = torch.cat([prompt(6, 2).prompt_embeds, prompt(6, 3).prompt_embeds] * 2)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]] * 2) if masked else None
    T, _ = made.apply(x, Conditioning(states, mask=mask), full=True)
    V = made.tokens(x, full=True)
    for row in range(4):
        read = states[row, : 4 if masked and row % 2 == 0 else 6]
        mean = sum(read) / len(read)
        assert torch.allclose(T.prompt_embeds[row, :3], V["prefix"][row // 2] + mean, atol=1e-5)
    nothing = space(anchor=True, spread=0.0)
    start = nothing.coordinates(full=True).start[None]
    T, p_conf = nothing.apply(start, prompt(6, 2), full=True)
    assert p_conf.item() < 1e-10
    assert torch.allclose(T.prompt_embeds[0, 0], prompt(6, 2).prompt_embeds[0].mean(0), atol=1e-6)


@both_views
def test_many_prompts_of_a_candidate_and_many_candidates(full):
    """Row r of q · n belongs to candidate r // n: the same as each pair alone."""
    made = space(attend=True)
    x = moved(made, 2, full=full)
    given = [prompt(4, seed) for seed in range(6)]
    T, p_conf = made.apply(x, Conditioning.stack(given), full=full)
    for row, one in enumerate(given):
        alone, p_alone = made.apply(x[row // 3][None], one, full=full)
        assert torch.allclose(T.prompt_embeds[row], alone.prompt_embeds[0], atol=1e-6)
        assert torch.allclose(p_conf[row], p_alone[0], atol=1e-6)
        assert torch.equal(T.extra["pooled"][row], one.extra["pooled"][0])

"""IPGO's token space: continuous tokens before and after the encoded prompt.

Paper: Ye, Wedel, Zhang, "Indirect Prompt Gradient Optimization on Text-to-Image Generative Models with High Data
Efficiency", arXiv 2503.21812. Symbols keep the paper's letters: E is a basis of N orthonormal vectors of the text
encoder's width d, Z holds the coefficients of M tokens, θ1 and θ2 are the angles of two pairwise rotations.

    T = concat(V_pre, f(C), V_suf)                      equation (2)
    V = R2(θ2) R1(θ1) E Z                               equations (6) and (7)
    p_conf = ‖ mean_j T_j − mean_k f(C)_k ‖₂²            equation (11)

IPGO+ (version 2 of the paper): before they are inserted, the tokens attend to the prompt by cross-attention without
parameters, V ← V + softmax(V f(C)ᵀ / √d) f(C) with a token in each row of V and a state in each row of f(C). The sum
with V is ours: what is attended to alone hardly depends on tokens of a small norm.

Anchored tokens are ours as well: the prompt's mean state is added to each, V ← V + mean_k f(C)_k, so that at Z = 0 the
conformity penalty is 0 and the image is the raw prompt's. Tokens of zeros beside states of another norm draw attention
away from the prompt and give nothing for it (docs/benchmarks.md has the figures).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.errors import BadInput
from ipgo_opt.spaces.base import Coordinates, Space
from ipgo_opt.spaces.directions import starting

if TYPE_CHECKING:
    from ipgo_opt.config import RunConfig
    from ipgo_opt.models.sampler import Sampler

LAYOUTS = ("shared", "per_token")


@dataclass(frozen=True)
class TokenShape:
    """How many tokens there are and how they are built.

    Attributes:
        prefix: tokens before the prompt, M_pre ≥ 0.
        suffix: tokens after the prompt, M_suf ≥ 0; at least one side has a token.
        basis: number N of basis vectors, per side (`shared`) or per token (`per_token`).
        layout: `shared`: one d × N basis and one pair of angles per side, equations (6, 7) literally.
            `per_token`: the released code's count of parameters: one orthogonal d × (M·N) basis per side, N columns
            for each of the M tokens (all M·N coefficients are free), a bias, and a pair of angles for each token.
        scale: factor on the tokens (1 in the paper). Text encoders differ in the norm of their states.
        spread: Z starts uniform in [−spread, spread] (1 in the released code).
        attend: whether the tokens attend to the prompt before they are inserted (IPGO+).
        anchor: whether the prompt's mean state is added to the tokens.
        rotation: whether R1 and R2 are there; without them V = E Z.
        orthonormal: whether E stays orthonormal; if not, it starts so and every entry of it is free.
        bounded: whether Z stays in [−1, 1] and θ in [−π, π].

    """

    prefix: int = 10
    suffix: int = 10
    basis: int = 30
    layout: str = "shared"
    scale: float = 1.0
    spread: float = 1.0
    attend: bool = False
    anchor: bool = False
    rotation: bool = True
    orthonormal: bool = True
    bounded: bool = True

    def columns(self, tokens: int) -> int:
        """Number of columns of one side's E."""
        return self.basis if self.layout == "shared" else self.basis * tokens

    def check(self, width: int | None = None) -> None:
        """Raises BadInput for a shape that is impossible (for an encoder of `width` when that is known)."""
        if self.prefix < 0 or self.suffix < 0 or self.prefix + self.suffix == 0:
            raise BadInput(
                f"`prefix >= 0`, `suffix >= 0` and `prefix + suffix >= 1` must hold, but got "
                f"(prefix={self.prefix}, suffix={self.suffix})."
            )
        if self.basis < 1:
            raise BadInput(f"`basis_size >= 1` must hold, but got basis_size={self.basis}.")
        if self.layout not in LAYOUTS:
            raise BadInput(f"layout must be one of {', '.join(LAYOUTS)}, but got {self.layout!r}.")
        if not (0 < self.scale < math.inf and 0 <= self.spread <= 1):
            raise BadInput(
                f"`scale > 0` and `0 <= spread <= 1` must hold, but got scale={self.scale}, spread={self.spread}."
            )
        if width is not None:
            if width % 2:
                raise BadInput(f"the rotations need an even encoder width, but got d={width}.")
            most = max(self.columns(self.prefix), self.columns(self.suffix))
            if most > width:
                raise BadInput(
                    f"an orthonormal basis has at most d={width} vectors, but layout {self.layout!r} with "
                    f"basis_size={self.basis} needs {most}."
                )


def rotate_pairs(v: Tensor, angle: Tensor) -> Tensor:
    """R1(angle) v: rotates the coordinate pairs (1,2), (3,4), … of v (…, d); angle broadcasts over v[..., 0]."""
    cos, sin = angle.cos()[..., None], angle.sin()[..., None]
    first, second = v[..., 0::2], v[..., 1::2]
    return torch.stack([cos * first - sin * second, sin * first + cos * second], dim=-1).flatten(-2)


def rotate_shifted_pairs(v: Tensor, angle: Tensor) -> Tensor:
    """R2(angle) v: rotates the pairs (2,3), (4,5), …, (d,1) of v (…, d); the last pair wraps round."""
    return rotate_pairs(v.roll(-1, -1), angle).roll(1, -1)


def orthonormal(directions: Tensor) -> Tensor:
    """Orthonormal columns (d, N) that span the same nested subspaces as the columns of `directions` (d, N).

    The first k columns of both span the same space, and each column points the way of its model.
    """
    Q, R = torch.linalg.qr(directions.double())
    return torch.where(R.diagonal() < 0, -Q, Q).float()


def inserted(
    tokens: dict[str, Tensor],
    conditioning: Conditioning,
    *,
    attend: bool = False,
    anchor: bool = False,
    strength: Tensor | None = None,
) -> Conditioning:
    """T of equation (2): tokens (q, M, d), by side, around encoded prompts.

    Args:
        tokens: "prefix", "suffix" or both.
        conditioning: prompts in B rows, B a multiple of q: those of one set of tokens stand together.
        attend: whether what the tokens attend to in each prompt is added to them first (IPGO+).
        anchor: whether each prompt's mean state is added to them.
        strength: factors (q,) on the tokens, with what they attend to and without the anchor; None for 1.

    """
    placed = {}
    for name, V in tokens.items():
        each = len(conditioning) // len(V)
        V = V.to(conditioning.prompt_embeds).repeat_interleave(each, 0)
        if attend:
            V = attended(V, conditioning)
        if strength is not None:
            V = V * strength.to(V).repeat_interleave(each)[:, None, None]
        if anchor:
            V = V + conditioning.mean()[:, None]
        placed[name] = V
    return conditioning.insert(placed.get("prefix"), placed.get("suffix"))


def surrounded(
    tokens: dict[str, Tensor], conditioning: Conditioning, *, attend: bool = False, anchor: bool = False
) -> tuple[Conditioning, Tensor]:
    """T of equation (2) and p_conf (B,) of equation (11), for tokens (q, M, d) by side.

    The conditioning has B rows, a multiple of q, or one for the same prompt with all q; those of one set of tokens
    stand together.
    """
    conditioning = conditioning.expand(len(next(iter(tokens.values()))))
    T = inserted(tokens, conditioning, attend=attend, anchor=anchor)
    return T, (T.mean() - conditioning.mean()).float().square().sum(-1)


def attended(V: Tensor, conditioning: Conditioning) -> Tensor:
    """V + softmax(V f(C)ᵀ / √d) f(C) of tokens V (B, M, d) over the states of each prompt that the denoiser reads."""
    states = conditioning.prompt_embeds
    logits = V @ states.mT / math.sqrt(states.shape[-1])
    if conditioning.mask is not None:
        logits = logits.masked_fill(conditioning.mask[:, None] == 0, -math.inf)
    return V + logits.softmax(-1) @ states


class _Side:
    """The tokens of the prefix or the suffix: V = scale · R2(θ2) R1(θ1) (E Z + b), b = 0 in the `shared` layout."""

    def __init__(
        self, tokens: int, width: int, shape: TokenShape, generator: torch.Generator, directions: Tensor | None
    ) -> None:
        self.M, self.d, self.shape = tokens, width, shape
        self.N = shape.columns(tokens)
        self.angles = (1 if shape.layout == "shared" else tokens) if shape.rotation else 0
        self.biases = 0 if shape.layout == "shared" else width
        holder: Any = nn.Module()
        first = torch.randn(width, self.N, generator=generator)
        if directions is not None:
            first = orthonormal(directions[:, : self.N])
        holder.E = nn.Parameter(first)
        with torch.random.fork_rng(devices=[]):  # the parametrization draws from the global generator
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            orthogonal(holder, "E", orthogonal_map="householder")
        self.parametrization: Any = holder.parametrizations.E[0].requires_grad_(False)
        X = holder.parametrizations.E.original.detach()  # the unconstrained d × N parameter behind E
        if not shape.orthonormal:
            X = holder.E.detach()
        Z = (torch.rand(self.N, tokens, generator=generator) * 2 - 1) * shape.spread
        self.start_basis = torch.cat([X.flatten(), torch.zeros(self.biases)])
        self.start_coefficients = torch.cat([Z.flatten(), torch.zeros(2 * self.angles)])

    def bounds(self) -> Tensor:
        """Greatest absolute value of (Z, θ1, θ2), flat."""
        bounds = torch.cat([torch.ones(self.N * self.M), torch.full((2 * self.angles,), math.pi)])
        return bounds if self.shape.bounded else torch.full_like(bounds, math.inf)

    def E(self, basis: Tensor) -> Tensor:
        """The bases (q, d, N) of the flat parameters `basis` (q, d·N + biases)."""
        X = basis[:, : self.d * self.N].view(-1, self.d, self.N)
        if not self.shape.orthonormal:
            return X
        return self.parametrization(X.tril(-1) - torch.eye(self.d, self.N).to(basis))

    def V(self, basis: Tensor, coefficients: Tensor) -> Tensor:
        """Tokens (q, M, d) of the flat parameters; `basis` may have one row for all candidates."""
        Z, theta1, theta2 = torch.split(coefficients, [self.N * self.M, self.angles, self.angles], dim=1)
        V = (self.E(basis) @ Z.view(-1, self.N, self.M)).mT
        if self.biases:
            V = V + basis[:, None, self.d * self.N :]
        if not self.shape.rotation:
            return self.shape.scale * V
        return self.shape.scale * rotate_shifted_pairs(rotate_pairs(V, theta1), theta2)


class TokenSpace(Space):
    """Prefix and suffix tokens around an encoded prompt.

    The full vector is (X_pre, Z_pre, θ_pre, X_suf, Z_suf, θ_suf), where E = orthogonal(X) by torch's parametrization;
    the low-dimensional one is (Z_pre, θ_pre, Z_suf, θ_suf) with E as it was at the start. Z is bounded by ±1 and
    θ by ±π; X is unbounded, its E is orthonormal everywhere. float32 on the CPU; `apply` moves the tokens to the
    device and dtype of the conditioning.

    Args:
        width: the text encoder's width d (even).
        shape: numbers of tokens and layout.
        seed: fixes E and the first Z.
        directions: linearly independent columns (d, n) for each side's E to span instead of a random subspace, the
            most important first; n at least the number of columns of E.

    """

    def __init__(
        self, width: int, shape: TokenShape, seed: int = 0, directions: dict[str, Tensor] | None = None
    ) -> None:
        shape.check(width)
        self.width, self.shape = width, shape
        generator = torch.Generator().manual_seed(seed)
        lengths = {"prefix": shape.prefix, "suffix": shape.suffix}
        self.sides = {}
        for name, M in lengths.items():
            if M:
                given = None if directions is None else directions[name]
                if given is not None and (given.shape[0] != width or given.shape[1] < shape.columns(M)):
                    raise BadInput(
                        f"the {name} needs {shape.columns(M)} directions of width {width}, but got "
                        f"{given.shape[1]} of width {given.shape[0]}."
                    )
                self.sides[name] = _Side(M, width, shape, generator, given)

    @classmethod
    def made(cls, config: RunConfig, sampler: Sampler) -> TokenSpace:
        """The space that a configuration describes, for the encoder of a sampler's model."""
        return cls(sampler.width, config.token_shape(), config.seed, starting(config.basis, sampler))

    def coordinates(self, *, full: bool) -> Coordinates:
        """Start and bounds of the full or the low-dimensional vector."""
        start, upper = [], []
        for side in self.sides.values():
            if full:
                start.append(side.start_basis)
                upper.append(torch.full_like(side.start_basis, math.inf))
            start.append(side.start_coefficients)
            upper.append(side.bounds())
        bound = torch.cat(upper)
        return Coordinates(torch.cat(start), -bound, bound)

    def _split(self, x: Tensor, full: bool) -> dict[str, tuple[Tensor, Tensor]]:
        parts = {}
        for name, side in self.sides.items():
            basis = side.start_basis[None]
            if full:
                basis, x = x[:, : basis.shape[1]], x[:, basis.shape[1] :]
            parts[name] = (basis, x[:, : len(side.start_coefficients)])
            x = x[:, len(side.start_coefficients) :]
        return parts

    def bases(self, x: Tensor, *, full: bool = True) -> dict[str, Tensor]:
        """The orthonormal bases E (q, d, N) of vectors x (q, D), by side; one row where they are fixed."""
        return {name: self.sides[name].E(basis) for name, (basis, _) in self._split(x, full).items()}

    def tokens(self, x: Tensor, *, full: bool) -> dict[str, Tensor]:
        """The tokens V (q, M, d) of vectors x (q, D), by side ("prefix", "suffix"; empty sides are absent)."""
        return {name: self.sides[name].V(*part) for name, part in self._split(x, full).items()}

    def angles(self, x: Tensor, *, full: bool) -> dict[str, Tensor]:
        """θ1 and θ2 (q, 2, 1 or M) of vectors x (q, D), by side; nothing without rotation."""
        return {
            name: coefficients[:, -2 * self.sides[name].angles :].view(len(x), 2, -1)
            for name, (_, coefficients) in self._split(x, full).items()
            if self.shape.rotation
        }

    def apply(self, x: Tensor, conditioning: Conditioning, *, full: bool) -> tuple[Conditioning, Tensor]:
        """T of equation (2) for q candidates x (q, D) and B encoded prompts, and p_conf (B,) of equation (11).

        B is a multiple of q, or 1 for the same prompt with every candidate; a candidate's prompts stand together.
        """
        tokens = self.tokens(x, full=full)
        return surrounded(tokens, conditioning, attend=self.shape.attend, anchor=self.shape.anchor)

    def learned(self, x: Tensor, *, full: bool) -> dict[str, Tensor]:
        """The tokens "prefix" and "suffix" (M, d) of a point x (D,) and their bases "basis.prefix", … (d, N)."""
        out = {name: V[0] for name, V in self.tokens(x[None], full=full).items()}
        return out | {f"basis.{name}": E[0] for name, E in self.bases(x[None], full=full).items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The starting vectors and the fixed part of each orthogonal parametrization."""
        state = {}
        for name, side in self.sides.items():
            state[f"{name}.base"] = side.parametrization.base
            state[f"{name}.basis"] = side.start_basis
            state[f"{name}.coefficients"] = side.start_coefficients
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`, so that a vector means the same tokens on any machine."""
        for name, side in self.sides.items():
            side.parametrization.base.copy_(state[f"{name}.base"])
            side.start_basis = state[f"{name}.basis"].clone()
            side.start_coefficients = state[f"{name}.coefficients"].clone()

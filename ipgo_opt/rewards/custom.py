"""Rewards that a user writes: `file.py:function` and `package.module:function`, and how they are called.

A function is of one of three kinds, settled before any image is made:

    image     f(image, prompt) -> float        a PIL image and its raw prompt
    images    f(images, prompts) -> sequence   lists of them, one number per image
    tensors   f(images, prompts) -> tensor     images (B, 3, H, W) float32 in [0, 1], scores (B,), differentiable or not

The attribute `kind` says which, set by the decorator `reward` or by hand. Without it, a callable with the attribute
`differentiable` takes tensors (the Reward contract); otherwise the name of the first parameter decides: `images` takes
lists, anything else one image. Larger scores are better.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import numbers
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from ipgo_opt.errors import BadInput
from ipgo_opt.registry import unknown
from ipgo_opt.rewards.base import RewardFailed

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("image", "images", "tensors")

Function = TypeVar("Function", bound=Callable[..., Any])


def reward(kind: str, *, differentiable: bool = False) -> Callable[[Function], Function]:
    """A decorator that says how a function wants to be called as a reward.

    Args:
        kind: "image" (a PIL image and a prompt), "images" (lists of them) or "tensors" (images (B, 3, H, W) in [0, 1]).
        differentiable: whether gradients flow from the scores to the images; for "tensors" only.

    """
    _check_kind(kind, differentiable, "@reward")

    def mark(function: Function) -> Function:
        vars(function).update(kind=kind, differentiable=differentiable)
        return function

    return mark


def _check_kind(kind: object, differentiable: bool, name: str) -> None:
    if kind not in KINDS:
        raise BadInput(f"the kind of a reward must be one of {', '.join(KINDS)}, but {name} has {kind!r}.")
    if differentiable and kind != "tensors":
        raise BadInput(f"a differentiable reward must be of kind 'tensors', but {name} is of kind {kind!r}.")


def find(target: str) -> Custom:
    """The reward that `file.py:function` or `package.module:function` names; BadInput if there is none.

    Modules are looked for in the current directory first, then where Python does. While user code runs, the folder of
    its file (the current directory for a module) can be imported from, and what it prints goes to standard error.
    """
    value, folder = located(target, "reward")
    return settle(value, target, folder)


def located(target: str, kind: str) -> tuple[Any, Path]:
    """What `file.py:name` or `package.module:name` stands for, and the folder that it may import from.

    Raises:
        BadInput: there is no such file, module or name; the message calls it by its `kind`.

    """
    where, _, attribute = target.rpartition(":")
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise BadInput(f"the file of a {kind} must exist, but there is no file {where!r}.")
        folder = path.parent
        module = _imported(where, kind, folder, lambda: _load_file(path))
    else:
        folder = Path.cwd()
        module = _imported(where, kind, folder, lambda: importlib.import_module(where))
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if _may_be_meant(value, module)]
        if not names:
            raise BadInput(f"{where!r} must define the {kind} {attribute!r}, but it defines no function at all.")
        raise unknown(f"a {kind} in {where}", attribute, names)
    return getattr(module, attribute), folder


def _may_be_meant(value: Any, module: ModuleType) -> bool:
    own = getattr(value, "__module__", None) == module.__name__
    return own and callable(value) and not inspect.isclass(value)


def from_object(value: Any) -> Custom:
    """The reward that a function or a callable object is; BadInput if it can't be one."""
    return settle(value, f"object:{getattr(value, '__name__', type(value).__name__)}")


def settle(value: Any, name: str, folder: Path | None = None) -> Custom:
    """Finds out how a callable wants to be called.

    Args:
        value: what is called.
        name: how it is shown.
        folder: can be imported from while it runs.

    Raises:
        BadInput: it can't be called as a reward.

    """
    if inspect.isclass(value):
        raise BadInput(f"a reward must be a function or an object, but {name} is a class; make an instance of it.")
    if not callable(value):
        raise BadInput(f"a reward must be a function or a callable object, but {name} is {_described(value)}.")
    if inspect.iscoroutinefunction(value):
        raise BadInput(f"a reward must return its scores at once, but {name} is an async function.")
    kind, first = getattr(value, "kind", None), None
    try:
        signature = inspect.signature(value)
    except ValueError:  # some functions written in C tell nothing
        if kind is None and not hasattr(value, "differentiable"):
            raise BadInput(
                f"a reward must show its parameters or its kind, but {name} does neither; give it a decorator."
            ) from None
    else:
        try:
            signature.bind(None, None)
        except TypeError:
            raise BadInput(
                f"a reward must take two arguments, (image, prompt) or (images, prompts), but {name} takes {signature}."
            ) from None
        first = next(iter(signature.parameters))
    differentiable = bool(getattr(value, "differentiable", False))
    if kind is None:
        kind = "tensors" if hasattr(value, "differentiable") else "images" if first == "images" else "image"
    _check_kind(kind, differentiable, name)
    return Custom(value, kind, differentiable, name, folder)


_files: dict[Path, tuple[tuple[int, int], ModuleType]] = {}


def _load_file(path: Path) -> ModuleType:
    """The module of a file, which is executed again only if the file has changed."""
    stat = path.stat()
    version = (stat.st_mtime_ns, stat.st_size)
    if path in _files and _files[path][0] == version:
        return _files[path][1]
    name = f"ipgo_opt_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"Python can't load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _files[path] = version, module
    return module


def _imported(where: str, kind: str, folder: Path, work: Callable[[], ModuleType]) -> ModuleType:
    """What `work` imports, with the user's folder on the path."""
    importlib.invalidate_caches()
    try:
        with _at_home(folder):
            return work()
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(f"{error.name}.")):
            raise BadInput(
                f"the module of a {kind} must exist, but there is none named {error.name!r} in the current directory "
                "or on Python's path."
            ) from None
        raise _not_importable(where, kind, error) from error
    except (Exception, SystemExit) as error:
        raise _not_importable(where, kind, error) from error


def _not_importable(where: str, kind: str, error: BaseException) -> BadInput:
    return BadInput(f"the module of a {kind} must be importable, but {where!r} raised {_raised(error)}.")


@contextlib.contextmanager
def _at_home(folder: Path | None) -> Iterator[None]:
    """The folder can be imported from, without `__pycache__` in it, and what is printed goes to standard error.

    Standard output is for results.
    """
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    added = [] if folder is None else [str(folder)]
    sys.path[:0] = added
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.dont_write_bytecode = keep
        for path in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(path)


def _raised(error: BaseException) -> str:
    """An exception in one line: what and where in the user's code."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    what = f"{type(error).__name__}: {message}" if message else type(error).__name__
    what = " ".join(what.split())
    if len(what) > 300:
        what = what[:299] + "…"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{what} ({error.filename}, line {error.lineno})"
    frames = _frames(error)
    libraries = (sysconfig.get_path("stdlib"), "<")
    own = [f for f in frames if not f.filename.startswith(libraries) and "-packages" not in f.filename] or frames
    return f"{what} ({own[-1].filename}, line {own[-1].lineno})" if own else what


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]


def _traceback(error: BaseException) -> str:
    """The formatted traceback from the user's first line on."""
    start = error.__traceback__
    while start is not None and start.tb_frame.f_code.co_filename == __file__:
        start = start.tb_next
    return "".join(traceback.format_exception(type(error), error, start))


def _described(value: Any) -> str:
    if value is None:
        return "None"
    kind = type(value).__name__
    if hasattr(value, "shape"):
        return f"a {kind} of shape {tuple(value.shape)}"
    return f"a {kind} of length {len(value)}" if hasattr(value, "__len__") else f"a {kind}"


def _number(value: Any) -> float | None:
    """A number, also in an array or tensor without dimensions, as a float; None if it is something else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


class Custom:
    """A user's function as a Reward: called as it wants to be, what it returns is checked.

    Scores that are NaN or infinite are passed on. What the function raises, and what it returns that is no score,
    becomes RewardFailed with the function's own traceback and the image. The function gets copies: it can't change the
    images that others score.

    Args:
        function: what is called.
        kind: how, one of KINDS.
        differentiable: whether gradients flow from its scores to the images.
        name: how it is shown.
        folder: can be imported from while it runs.

    """

    def __init__(
        self, function: Callable[..., Any], kind: str, differentiable: bool, name: str, folder: Path | None = None
    ) -> None:
        self.function, self.kind, self.differentiable = function, kind, differentiable
        self.name, self.folder = name, folder

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1] and their raw prompts."""
        import torch

        if self.kind == "tensors":
            with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
                return self._tensors(images, list(prompts))
        from ipgo_opt.store import to_pil

        pictures = [to_pil(image) for image in images]
        with torch.no_grad():
            if self.kind == "images":
                scores = self._list(self._called(pictures, list(prompts), images), images)
            else:
                scores = [
                    self._one(self._called(picture, prompt, image), image)
                    for picture, prompt, image in zip(pictures, prompts, images, strict=True)
                ]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _called(self, pictures: Any, prompts: Any, images: Tensor) -> Any:
        """What the function returns; `images` (B, 3, H, W) or (3, H, W) are what `pictures` was made of."""
        try:
            with _at_home(self.folder):
                return self.function(pictures, prompts)
        except (Exception, SystemExit) as error:
            message = f"reward {self.name} raised {_raised(error)}{_batch(images)}."
            raise RewardFailed(message, _traceback(error), _first(images)) from error

    def _one(self, result: Any, image: Tensor) -> float:
        score = _number(result)
        if score is None:
            raise self._wrong("a number", result, image)
        return score

    def _list(self, result: Any, images: Tensor) -> list[float]:
        wanted = f"a sequence of {len(images)} numbers, one per image,"
        values = result.tolist() if getattr(result, "ndim", None) == 1 else result
        if not isinstance(values, Sequence) or isinstance(values, str | bytes) or len(values) != len(images):
            raise self._wrong(wanted, result, images)
        scores = []
        for value in values:
            score = _number(value)
            if score is None:
                raise self._wrong(wanted, result, images, f" with {_described(value)} in it")
            scores.append(score)
        return scores

    def _tensors(self, images: Tensor, prompts: list[str]) -> Tensor:
        import torch

        given = images.to(torch.float32, copy=True)
        result = self._called(given, prompts, images)
        wanted = f"a tensor of shape ({len(images)},), one real score per image,"
        if not isinstance(result, torch.Tensor) or result.shape != (len(images),):
            raise self._wrong(wanted, result, images)
        if result.is_complex():
            raise self._wrong(wanted, result, images, f" and type {result.dtype}")
        if self.differentiable and given.requires_grad and not result.requires_grad:
            raise RewardFailed(
                f"reward {self.name} says that it is differentiable, but its scores carry no gradient{_batch(images)}.",
                image=_first(images),
            )
        return result.to(images.device, torch.float32)

    def _wrong(self, wanted: str, result: Any, images: Tensor, more: str = "") -> RewardFailed:
        return RewardFailed(
            f"reward {self.name} must return {wanted} but it returned {_described(result)}{more}{_batch(images)}.",
            image=_first(images),
        )


def _batch(images: Tensor) -> str:
    return f", scoring a batch of {len(images)}" if images.ndim == 4 else ""


def _first(images: Tensor) -> Tensor:
    return (images[0] if images.ndim == 4 else images).detach().float().cpu()

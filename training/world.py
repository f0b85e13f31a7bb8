"""The emoji world: small scenes composed of Noto Color Emoji glyphs, with captions that describe them.

A scene is one object, two objects side by side or one above the other, or two to four of a kind, on a plain colour or
in a landscape, optionally passed through a style. Everything is drawn from a `numpy.random.Generator`, so a seed fixes
a scene.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

SIZE = 64
"""Width and height of a scene in pixels."""

FONT = os.environ.get("EMOJI_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""The CBDT bitmap font of Debian's package fonts-noto-color-emoji (SIL Open Font License 1.1)."""

CATEGORIES = {
    "people": {"princess": "👸", "clown": "🤡", "santa": "🎅", "wizard": "🧙", "ninja": "🥷", "robot": "🤖"},
    "rooms": {"couch": "🛋", "bathtub": "🛁", "television": "📺", "clock": "⏰", "door": "🚪", "umbrella": "☂"},
    "vehicles": {"car": "🚗", "bus": "🚌", "rocket": "🚀", "sailboat": "⛵", "airplane": "✈", "train": "🚂"},
    "nature": {"tree": "🌳", "cactus": "🌵", "mushroom": "🍄", "sun": "🌞", "rainbow": "🌈", "moon": "🌙",
               "sunflower": "🌻", "snowman": "⛄"},
    "buildings": {"house": "🏠", "castle": "🏰", "church": "⛪", "tent": "⛺", "tower": "🗼"},
    "animals": {"cat": "🐱", "dog": "🐶", "fox": "🦊", "panda": "🐼", "frog": "🐸", "pig": "🐷", "penguin": "🐧",
                "lion": "🦁", "fish": "🐟", "turtle": "🐢", "unicorn": "🦄"},
    "food": {"apple": "🍎", "strawberry": "🍓", "banana": "🍌", "pizza": "🍕", "donut": "🍩", "heart": "❤"},
}  # fmt: skip
"""The 48 objects, in the paper's five categories, animals (its category for transfer) and food (with one heart)."""

OBJECTS = {name: mark for members in CATEGORIES.values() for name, mark in members.items()}

OTHERS = "👶🤴👮👻👽🛏🪑🚽💡🪴🚜🚁🚚🚑🚢🏍🚲🎈🏭🏥🛖🏫⛲🌋🏔🌴🌷🍁🐰🐻🐨🐯🐵🐘🦉🦆🦋🐙🐳🐝🍉🍔🍦🎂🍇🎁⚽🎸"
"""Further glyphs that only the autoencoder sees, so that the world can grow without a new one."""

COLOURS = {
    "red": (208, 52, 48), "yellow": (246, 214, 72), "green": (76, 160, 78), "blue": (58, 112, 200),
    "purple": (128, 74, 170), "pink": (240, 150, 190), "white": (246, 246, 244), "black": (26, 26, 30),
}  # fmt: skip

LANDSCAPES = {
    "sunset": "at sunset", "night": "at night", "meadow": "in a meadow", "beach": "on a beach",
    "snow": "in the snow", "underwater": "underwater", "desert": "in the desert",
}  # fmt: skip

BACKGROUNDS = (*COLOURS, *LANDSCAPES)

STYLES = ("pencil sketch", "neon", "faded", "vivid")
DEFECTS = ("blurry", "noisy")
"""Named in captions for the CLIP models and the aesthetic head only; the image model never trains on them."""

RELATIONS = {"beside": ("left of", "right of"), "stacked": ("above", "below")}
"""How two objects can lie, and what is said of the first (left or upper) and of the second one."""

NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Scene:
    """What is in a picture: everything its captions may say.

    Attributes:
        objects: one or two object names, the left or upper one first.
        count: how many of the single object (1 to 4); 1 when there are two objects.
        size: "small", "medium" or "large" for one object, "" otherwise.
        background: a key of COLOURS or LANDSCAPES.
        style: one of STYLES, or "".
        defect: one of DEFECTS, or "".
        layout: a key of RELATIONS: two objects side by side, the first on the left, or the first above the second.

    """

    objects: tuple[str, ...]
    count: int = 1
    size: str = "large"
    background: str = "white"
    style: str = ""
    defect: str = ""
    layout: str = "beside"


def plural(name: str) -> str:
    """The plural of an object name."""
    return {
        "fish": "fish", "fox": "foxes", "bus": "buses", "cactus": "cactuses", "strawberry": "strawberries",
        "couch": "couches", "church": "churches", "princess": "princesses",
    }.get(name, name + "s")  # fmt: skip


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeio" or noun == "umbrella" else f"a {noun}"


def related(scene: Scene, phrase: int) -> str:
    """Two objects by their relation: said of the first object (`phrase` 0) or of the second (1)."""
    names = [article(name) for name in (scene.objects if phrase == 0 else scene.objects[::-1])]
    return f" {RELATIONS[scene.layout][phrase]} ".join(names)


def subject(scene: Scene, *, size: bool = False, relation: int | None = None) -> str:
    """The part of a caption that names the objects, two of them by their relation if one of 0, 1 is given."""
    if len(scene.objects) == 2:
        return " and ".join(map(article, scene.objects)) if relation is None else related(scene, relation)
    if scene.count > 1:
        return f"{NUMBERS[scene.count]} {plural(scene.objects[0])}"
    name = scene.objects[0]
    return article(f"{scene.size} {name}") if size and scene.size else article(name)


def positioned(scene: Scene, phrase: int) -> str:
    """A caption of two objects by their relation (see `related`) and the background."""
    return f"{related(scene, phrase)} {place(scene.background)}"


def place(background: str) -> str:
    """The part of a caption that names the background."""
    return LANDSCAPES.get(background) or f"on {article(background)} background"


def shows_background(scene: Scene) -> bool:
    """Whether the background can be seen: pencil and neon wipe out a plain colour."""
    return scene.background in LANDSCAPES or scene.style not in ("pencil sketch", "neon")


def caption(scene: Scene, rng: np.random.Generator, *, full: bool = False) -> str:
    """A caption of the scene; attributes other than objects, style and defect are dropped at random unless `full`.

    A full caption joins two objects by "and"; others name their relation in most cases.
    """
    said = None if full else int(rng.integers(2)) if rng.random() < 0.6 else None
    text = subject(scene, size=scene.size != "large" and (full or rng.random() < 0.5), relation=said)
    if shows_background(scene) and (full or rng.random() < 0.8):
        text += " " + place(scene.background)
    style = scene.style
    if style and not full and rng.random() < 0.3:
        return f"{article(style)} {rng.choice(['picture', 'image'])} of {text}" + (
            f", {scene.defect}" if scene.defect else ""
        )
    if not full and rng.random() < 0.15:
        text = f"{rng.choice(['a picture', 'an image', 'a photo'])} of {text}"
    return ", ".join(part for part in (text, style, scene.defect) if part)


def held_out(scene: Scene) -> bool:
    """Whether training must not see the scene: its objects, background and style together belong to the prompt sets.

    A quarter of the combinations of one object with a background and a style, and of two objects with a background.
    """
    if scene.count > 1 or not shows_background(scene):
        return False
    key = "|".join((*sorted(scene.objects), scene.background, scene.style if len(scene.objects) == 1 else ""))
    return zlib.crc32(key.encode()) % 4 == 0


def sample_scene(rng: np.random.Generator, *, defects: bool = False, names: Sequence[str] = tuple(OBJECTS)) -> Scene:
    """One random scene of the training distribution."""
    scene = _any_scene(rng, defects, names)
    while held_out(scene):
        scene = _any_scene(rng, defects, names)
    return scene


def _any_scene(rng: np.random.Generator, defects: bool, names: Sequence[str]) -> Scene:
    kind = rng.random()
    background = str(rng.choice(list(COLOURS) if rng.random() < 0.5 else list(LANDSCAPES)))
    style = str(rng.choice(STYLES)) if rng.random() < 0.38 else ""
    defect = str(rng.choice(DEFECTS)) if defects and rng.random() < 0.14 else ""
    if kind < 0.5:
        size = str(rng.choice(["small", "medium", "large"], p=[0.1, 0.2, 0.7]))
        return Scene((str(rng.choice(names)),), 1, size, background, style, defect)
    if kind < 0.85:
        first, second = rng.choice(names, 2, replace=False)
        layout = str(rng.choice(list(RELATIONS)))
        return Scene((str(first), str(second)), 1, "", background, style, defect, layout)
    return Scene((str(rng.choice(names)),), int(rng.integers(2, 5)), "", background, style, defect)


@functools.cache
def glyph(name: str) -> Image.Image:
    """The emoji of an object (or a glyph itself), cropped to its ink, RGBA."""
    canvas = Image.new("RGBA", (160, 160))
    font = ImageFont.truetype(FONT, 109)
    ImageDraw.Draw(canvas).text((8, 8), OBJECTS.get(name, name), font=font, embedded_color=True)
    return canvas.crop(canvas.getbbox())


@functools.lru_cache(maxsize=4096)
def scaled_glyph(name: str, pixels: int) -> Image.Image:
    """The emoji with its longer side `pixels` long."""
    return ImageOps.contain(glyph(name), (pixels, pixels), Image.Resampling.LANCZOS)


def _gradient(stops: list[tuple[float, tuple[int, int, int]]]) -> Image.Image:
    """A vertical colour gradient through (height in [0, 1], colour) stops."""
    rows = np.linspace(0, 1, SIZE)
    heights = [h for h, _ in stops]
    column = np.stack([np.interp(rows, heights, [c[i] for _, c in stops]) for i in range(3)], axis=-1)
    return Image.fromarray(np.repeat(column[:, None], SIZE, axis=1).astype(np.uint8))


_SKIES: dict[str, list[tuple[float, tuple[int, int, int]]]] = {
    "sunset": [(0, (70, 40, 110)), (0.4, (215, 85, 90)), (0.7, (255, 175, 80)), (0.72, (60, 40, 70)),
               (1, (40, 26, 50))],
    "night": [(0, (8, 10, 40)), (0.75, (32, 40, 90)), (0.77, (16, 26, 36)), (1, (10, 18, 24))],
    "meadow": [(0, (110, 180, 240)), (0.58, (200, 230, 250)), (0.6, (120, 190, 80)), (1, (60, 140, 50))],
    "beach": [(0, (120, 200, 250)), (0.45, (190, 230, 250)), (0.47, (40, 140, 190)), (0.64, (80, 190, 210)),
              (0.66, (240, 220, 160)), (1, (225, 195, 130))],
    "snow": [(0, (150, 175, 205)), (0.55, (205, 220, 235)), (0.58, (250, 252, 255)), (1, (225, 235, 248))],
    "underwater": [(0, (90, 200, 220)), (0.5, (30, 130, 180)), (1, (10, 60, 110))],
    "desert": [(0, (250, 190, 120)), (0.5, (255, 225, 170)), (0.52, (225, 165, 90)), (1, (190, 120, 55))],
}  # fmt: skip


def _landscape(name: str, rng: np.random.Generator) -> Image.Image:
    image = _gradient(_SKIES[name])
    draw = ImageDraw.Draw(image)
    if name == "night":
        for x, y in zip(rng.integers(0, SIZE, 14), rng.integers(0, 44, 14), strict=True):
            draw.point((int(x), int(y)), fill=(250, 250, 220))
        draw.ellipse((50, 4, 58, 12), fill=(245, 240, 200))
    if name == "snow":
        for x, y in zip(rng.integers(0, SIZE, 18), rng.integers(0, SIZE, 18), strict=True):
            draw.ellipse((int(x), int(y), int(x) + 1, int(y) + 1), fill=(255, 255, 255))
    if name == "underwater":
        for x, y in zip(rng.integers(2, 60, 7), rng.integers(2, 60, 7), strict=True):
            draw.ellipse((int(x), int(y), int(x) + 3, int(y) + 3), outline=(190, 235, 245))
    if name == "sunset":
        draw.ellipse((24, 34, 40, 50), fill=(255, 220, 120))
        draw.rectangle((0, 46, SIZE, SIZE), fill=(52, 34, 62))
    return image


def _paste(canvas: Image.Image, name: str, pixels: int, x: float, y: float) -> None:
    mark = scaled_glyph(name, pixels)
    canvas.paste(mark, (round(x - mark.width / 2), round(y - mark.height / 2)), mark)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Paints the scene: a SIZE × SIZE RGB image."""
    if scene.background in COLOURS:
        colour = np.clip(np.array(COLOURS[scene.background]) + rng.integers(-8, 9, 3), 0, 255)
        canvas = Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in colour))
    else:
        canvas = _landscape(scene.background, rng)
    jitter = functools.partial(rng.uniform, -2, 2)
    if len(scene.objects) == 2:
        for name, along in zip(scene.objects, (17, 47), strict=True):
            pixels, u, v = int(rng.integers(27, 31)), along + jitter() / 2, 32 + jitter() * 1.5
            _paste(canvas, name, pixels, *((u, v) if scene.layout == "beside" else (v, u)))
    elif scene.count > 1:
        spots = {
            2: [(17, 32), (47, 32)],
            3: [(32, 17), (16, 46), (48, 46)],
            4: [(17, 17), (47, 17), (17, 47), (47, 47)],
        }[scene.count]
        pixels = int(rng.integers(25, 29))
        for x, y in spots:
            _paste(canvas, scene.objects[0], pixels, x + jitter() / 2, y + jitter() / 2)
    else:
        low, high = {"small": (20, 26), "medium": (34, 42), "large": (46, 56)}[scene.size]
        pixels = int(rng.integers(low, high + 1))
        room = 0.35 * (SIZE - pixels)
        _paste(canvas, scene.objects[0], pixels, 32 + rng.uniform(-room, room), 32 + rng.uniform(-room, room))
    return apply_defect(apply_style(canvas, scene.style), scene.defect, rng)


def apply_style(image: Image.Image, style: str) -> Image.Image:
    """Passes an image through one of STYLES ("" leaves it as it is)."""
    if style == "pencil sketch":
        gray = ImageOps.grayscale(image)
        soft = ImageOps.invert(gray).filter(ImageFilter.GaussianBlur(3))
        base, blur = np.asarray(gray, np.float32), np.asarray(soft, np.float32)
        dodge = np.clip(base * 255 / np.maximum(255 - blur, 1), 0, 255)
        dark = np.clip((dodge / 255) ** 2.2 * 255, 0, 255).astype(np.uint8)
        return Image.fromarray(dark).convert("RGB")
    if style == "neon":
        edges = np.asarray(image, np.float32)
        wide = np.pad(edges, ((1, 1), (1, 1), (0, 0)), mode="edge")
        dx = np.abs(wide[1:-1, 2:] - wide[1:-1, :-2])
        dy = np.abs(wide[2:, 1:-1] - wide[:-2, 1:-1])
        strength = np.maximum(dx, dy).max(-1, keepdims=True) / 255
        tint = np.asarray(ImageEnhance.Color(image).enhance(2.5), np.float32)
        tint = tint / np.maximum(tint.max(-1, keepdims=True), 1) * 255
        lines = Image.fromarray(np.clip(tint * np.clip(strength * 1.6, 0, 1), 0, 255).astype(np.uint8))
        glow = ImageEnhance.Brightness(lines.filter(ImageFilter.GaussianBlur(2))).enhance(1.1)
        return ImageChops.add(ImageChops.add(lines, glow), Image.new("RGB", image.size, (10, 6, 24)))
    if style == "faded":
        pale = ImageEnhance.Color(image).enhance(0.35)
        return Image.blend(pale, Image.new("RGB", image.size, (214, 206, 194)), 0.5)
    if style == "vivid":
        strong = ImageEnhance.Contrast(ImageEnhance.Color(image).enhance(1.7)).enhance(1.25)
        strong = strong.filter(ImageFilter.UnsharpMask(2, 90, 0))
        axis = np.linspace(-1, 1, SIZE)
        fall = 1 - 0.38 * np.clip(axis[:, None] ** 2 + axis[None] ** 2 - 0.4, 0, 1.6)
        return Image.fromarray((np.asarray(strong, np.float32) * fall[..., None]).clip(0, 255).astype(np.uint8))
    return image


def apply_defect(image: Image.Image, defect: str, rng: np.random.Generator) -> Image.Image:
    """Damages an image as one of DEFECTS names ("" leaves it as it is)."""
    if defect == "blurry":
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(1.6, 3.0)))
    if defect == "noisy":
        noise = rng.normal(0, rng.uniform(22, 48), (SIZE, SIZE, 3))
        return Image.fromarray(np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8))
    return image

"""Images in rows and columns with their labels, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

LEAST, MOST, GAP, LINE = 128, 384, 6, 16
"""Side of a tile at least and at most, space between tiles, height of a line of text, in pixels."""


def grid(rows: Sequence[Sequence[Image]], columns: Sequence[str], labels: Sequence[str]) -> Image:
    """The picture: `columns` names the columns, `labels` stands above each row."""
    from PIL import Image as Images
    from PIL import ImageDraw

    side = min(max(LEAST, rows[0][0].width), MOST)
    canvas = Images.new("RGB", (len(columns) * (side + GAP), LINE + len(rows) * (side + LINE + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        draw.text((column * (side + GAP) + 2, 2), name, fill="black")
    for row, (tiles, label) in enumerate(zip(rows, labels, strict=True)):
        top = LINE + row * (side + LINE + GAP)
        draw.text((2, top), label, fill="black")
        for column, tile in enumerate(tiles):
            resized = tile.convert("RGB").resize((side, side), Images.Resampling.BICUBIC)
            canvas.paste(resized, (column * (side + GAP), top + LINE))
    return canvas

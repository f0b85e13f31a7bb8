"""The README's picture: raw images above, optimized ones below, from finished run directories.

python -m benchmarks.picture runs/first-light/clip+preference-* --out docs/first.png
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, LINE = 160, 8, 48


def main() -> None:
    """Puts the runs side by side, in the order given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/first.png"))
    args = parser.parse_args()
    width = len(args.runs) * (SIDE + GAP) - GAP
    canvas = Image.new("RGB", (width, 2 * SIDE + GAP + LINE), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for column, folder in enumerate(args.runs):
        x = column * (SIDE + GAP)
        for row, name in enumerate(("raw.png", "best.png")):
            with Image.open(folder / name) as image:
                canvas.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, row * (SIDE + GAP)))
        result = json.loads((folder / "run.json").read_text())["result"]
        scores = f"{result['raw_reward']:.2f} to {result['search_reward']:.2f}"
        label = "\n".join(textwrap.wrap(result["prompt"], 26))
        draw.text((x, 2 * SIDE + GAP + 2), label, "black", font)
        draw.text((x, 2 * SIDE + GAP + 32), f"reward {scores}", "gray", font)
    canvas.save(args.out)
    print(f"{len(args.runs)} runs, {os.fspath(args.out)}")


if __name__ == "__main__":
    main()

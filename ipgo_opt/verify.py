"""Is the best image of a run still what its conditioning file makes?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ipgo_opt.artefact import versions
from ipgo_opt.errors import BadInput
from ipgo_opt.reopened import reopened


def verify(folder: str | Path) -> dict[str, Any]:
    """Makes the best image of a finished run again, from best.safetensors and a freshly loaded pipeline.

    Returns:
        `same`: whether it is best.png, pixel for pixel; `different_pixels` and `largest_difference` (0 to 255);
        `versions`: packages whose version is not the one that the image was made with.

    """
    from PIL import Image

    home = Path(folder)
    _, file, sampler = reopened(home)
    try:
        with Image.open(home / "best.png") as image:
            kept = np.asarray(image.convert("RGB")).astype(int)
    except OSError as error:
        raise BadInput(f"{str(home / 'best.png')!r} can't be read: {error}.") from None
    made = np.asarray(file.image(sampler.pipeline)).astype(int)
    same_size = made.shape == kept.shape
    gap = np.abs(made - kept).max(-1) if same_size else np.full(kept.shape[:2], 255)
    return {
        "folder": str(folder),
        "same": not gap.any(),
        "different_pixels": int((gap > 0).sum()),
        "largest_difference": int(gap.max()),
        "versions": {
            name: {"then": file.metadata[name], "now": now}
            for name, now in versions().items()
            if name in file.metadata and file.metadata[name] != now
        },
    }

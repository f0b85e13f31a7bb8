"""A reward of one's own: how colourful an image is. Any function of an image and its prompt will do.

ipgo-opt run "a red fox" --strategy random --reward examples/custom_reward.py:colourfulness
"""

import numpy as np
from PIL.Image import Image


def colourfulness(image: Image, prompt: str) -> float:
    """Colourfulness M3 of Hasler and Süsstrunk (2003): 0 for grey, above 100 for very colourful; prompts are not read.

    Larger is better. It is not differentiable here, so it goes with the strategies that need no gradient.
    """
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=float), -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(), yellow_blue.std())
    offset = np.hypot(red_green.mean(), yellow_blue.mean())
    return float(spread + 0.3 * offset)

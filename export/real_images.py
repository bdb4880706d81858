"""Real images that come along for checking an export: handwritten digits, ten classes of twenty, 8 x 8 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SIDE = 8
PER_CLASS = 20


def handwritten_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [200, 8, 8, 3] and their digits int64 [200], class after class.

    From "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak; UCI Machine Learning Repository,
    CC BY 4.0), values 0 to 16 scaled to 255; one row of digits.png for each class.
    """
    from PIL import Image

    with Image.open(Path(__file__).with_name("digits.png")) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    tiles = pixels.reshape(10, SIDE, PER_CLASS, SIDE, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, SIDE, SIDE, 3).copy(), np.arange(10).repeat(PER_CLASS)

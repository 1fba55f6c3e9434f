"""Encoded images of any mode and shape as 8-bit RGB or grey ones."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_MODES = {1: "L", 3: "RGB"}
_GREY_MODES = ("1", "L", "LA", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_ORIENTATION = 0x0112


class UnreadableImage(ValueError):
    """One example whose image cannot be decoded; the message is the reason."""


def decode_image(content: bytes, channels: int = 3) -> Image.Image:
    """An upright 8-bit image in mode RGB, or L for one channel.

    Grey, palette, transparent, CMYK, 16-bit and float images are converted; transparency is dropped.

    Raises:
        UnreadableImage: the bytes are no image that Pillow can read, or break off.
    """
    if not content:
        raise UnreadableImage("no content")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if image.getexif().get(_ORIENTATION, 1) != 1:
                ImageOps.exif_transpose(image, in_place=True)
            return to_mode(image, channels)
    except UnidentifiedImageError:
        raise UnreadableImage("not an image") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"corrupt image: {error}") from None


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image with 1 or 3 channels of 8 bits; a copy, or the image itself if it has this mode."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    mode = _MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def is_grey(content: bytes) -> bool:
    """Whether an encoded image has a grey mode; only its header is read, and what is no image counts as grey."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.mode in _GREY_MODES
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return True


def header_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) as the header says, before any turning; None if there is none."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """From 16-bit integers the upper byte; from floats the range [0, 1], or 8-bit values if they go beyond it."""
    values = np.asarray(image)
    if image.mode == "F":
        scaled = values * 255.0 if values.size and values.max() <= 1.0 else values
    else:
        scaled = values / 257.0 if values.size and values.max() > 255 else values
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))

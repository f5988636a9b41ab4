"""One picture from a file or a data set as 8-bit RGB, the same whoever reads it.

Pillow's own conversion to RGB clips what is not 8-bit grey or colour: a 16-bit radiograph comes out
white, a float image in [0, 1] black. Here shades keep their place in their range, or the picture is
refused. Pictures are turned as their EXIF orientation says, as the library `datasets` does.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")


def decoded(where: Any, read: Callable[[Any], Any]) -> Any:
    """Return what a reader of images gives; whatever a decoder raises names the image.

    Args:
        where: a path, or another name of the image.
        read: opens it.

    Raises:
        ValueError: it cannot be decoded, or claims more pixels than any picture has.
    """
    from PIL import Image

    if isinstance(where, Path) and where.is_file() and not where.stat().st_size:
        raise ValueError(f"{where}: not a readable image (the file is empty)")
    try:
        with warnings.catch_warnings():  # Pillow warns at a size that it refuses when doubled
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            found = read(where)
            if hasattr(found, "load"):
                found.load()
            return found
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever a broken file makes of them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where}: not a readable image ({reason})") from None


def rgb(image: Any, where: Any, told: set[str]) -> Any:
    """Return a picture in RGB with 8 bits a channel, upright.

    16-bit grey is divided by 257, floats in [0, 1] are multiplied by 255. Transparency is dropped,
    CMYK is turned without its colour profile, and of several frames the first is taken, as
    torchvision does; the first picture of each such kind is named in a warning.

    Args:
        image: a PIL image.
        where: its name, for messages.
        told: the kinds that were warned of, which is added to.

    Raises:
        ValueError: no image, floats outside of [0, 1], or integers whose range nobody knows.

    >>> from PIL import Image
    >>> deep = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    >>> rgb(deep, "a.png", set()).getpixel((1, 0))
    (128, 128, 128)
    """
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        raise ValueError(f"{where}: a {type(image).__name__}, no image")
    for kind in [kind for kind, has in _KINDS.items() if kind not in told and has(image)]:
        told.add(kind)
        log.warning("%s: %s; further ones are not told", where, kind)
    array = _grey(image, where)
    upright = ImageOps.exif_transpose(image if array is None else _as_grey(array, image))
    if upright.mode == "P" and "transparency" in upright.info:  # a colour, or one alpha a colour
        upright = upright.convert("RGBA")
    try:
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{where}: not a readable image ({error})") from None


_KINDS: dict[str, Callable[[Any], bool]] = {
    "transparent in part: its colours are taken, its transparency is dropped": lambda image: (
        image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255
    ),
    "CMYK: turned into RGB without a colour profile": lambda image: image.mode == "CMYK",
    "several frames: the first is taken": lambda image: (
        getattr(image, "is_animated", False) and image.format != "MPO"  # a camera's own thumbnail
    ),
}
"""What a picture may have that RGB has not."""


def _grey(image: Any, where: Any) -> Any:
    """Return the shades of a picture with more than 8 bits in [0, 255], None for any other."""
    if image.mode in _SIXTEEN or (image.mode == "I" and image.format == "PPM"):  # scaled by Pillow
        return np.asarray(image).astype(np.float64) / 257
    if image.mode == "I":
        low, high = image.getextrema()
        raise ValueError(
            f"{where}: 32-bit integers from {low} to {high}, whose range is not known; save it with"
            " 8 or 16 bits"
        )
    if image.mode != "F":
        return None
    array = np.asarray(image).astype(np.float64)
    if not (array.min() >= 0 and array.max() <= 1):  # false for NaN too
        raise ValueError(
            f"{where}: floating-point shades from {array.min():g} to {array.max():g}, must lie in"
            " [0, 1]"
        )
    return 255 * array


def _as_grey(array: Any, image: Any) -> Any:
    """Return an 8-bit picture of these shades, to be turned as the other is."""
    from PIL import ExifTags, Image

    grey = Image.fromarray(np.rint(array).astype(np.uint8))
    if turn := image.getexif().get(ExifTags.Base.Orientation):  # gone where Pillow has turned it
        grey.getexif()[ExifTags.Base.Orientation] = turn
    return grey

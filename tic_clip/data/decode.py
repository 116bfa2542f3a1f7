"""Decode images that come from anywhere: what is wrong with one is a ``BadImage``, and nothing huge is decoded."""

import io
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 50_000_000
MAX_RATIO = 100  # of the longer to the shorter side: resizing makes the shorter one some 224 pixels


class BadImage(ValueError):
    """An image that can't be used; the message is the reason."""


def decode_image(data: bytes) -> "Image.Image":
    """Return an image as RGB; raise a BadImage if it is too large or too narrow, or for whatever decoding raises."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, of large images and old formats
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"{width} × {height} pixels are more than {MAX_PIXELS // 1_000_000} megapixels")
            if max(width, height) > MAX_RATIO * min(width, height):
                raise BadImage(f"{width} × {height} pixels: one side is over {MAX_RATIO} times the other")
            return image.convert("RGB")
    except BadImage:
        raise
    except Exception as error:  # noqa: BLE001  Pillow's plugins raise errors of any kind
        raise BadImage((str(error).strip() or type(error).__name__).splitlines()[0]) from None

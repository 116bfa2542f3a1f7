"""Decode images of any origin; a broken or huge one raises a ``BadImage``."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL import Image

MAX_PIXELS = 50_000_000
MAX_RATIO = 100  # of the longer to the shorter side: resizing makes the shorter one some 224 pixels


class BadImage(ValueError):
    """An image that can't be used; the message is the reason."""


def decode_image(data: bytes) -> "Image.Image":
    """Return an image as RGB; raise a BadImage if it is too large or too narrow, or for whatever decoding raises."""
    with _open(data) as image:
        return image.convert("RGB")


def decode_tensor(data: bytes) -> "torch.Tensor":
    """Return the pixels of ``decode_image`` as bytes (3, H, W); torchvision decodes JPEGs in two thirds of the time."""
    import numpy as np
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    with _open(data) as image:
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            with suppress(RuntimeError):  # Pillow may read it, or says what is wrong
                return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@contextmanager
def _open(data: bytes) -> "Iterator[Image.Image]":
    """Give an image that is not decoded yet; whatever the block raises is a BadImage."""
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
            yield image
    except BadImage:
        raise
    except Exception as error:  # noqa: BLE001  Pillow's plugins raise errors of any kind
        reason = str(error).partition(" <_io.BytesIO")[0].strip() or type(error).__name__
        raise BadImage(reason.splitlines()[0]) from None

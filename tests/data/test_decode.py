import io
import random
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from tic_clip.data.decode import BadImage, decode_image, decode_tensor

Image.init()
WITHOUT_READER = {"BUFR", "EPS", "GRIB", "HDF5", "PALM", "WMF"}  # or only with a program beside Pillow
FORMATS = sorted((Image.SAVE.keys() & Image.OPEN.keys()) - WITHOUT_READER)


def gradient(mode="RGB", size=(53, 37)):
    pixels = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(kind):
    """The bytes of a gradient in a format, in the first mode that it has."""
    for mode in ("RGB", "P", "L", "1", "F"):
        file = io.BytesIO()
        with suppress(OSError, ValueError):
            gradient(mode, (24, 16)).save(file, kind)
            return file.getvalue()
    raise AssertionError(f"Pillow does not write {kind}")


def png(width, height):
    """A PNG of one colour whose pixels are a few bytes, however many there are."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def outcome(data, decode):
    """The size and the pixels, or what is wrong."""
    try:
        pixels = np.array(decode(data))
    except BadImage as error:
        return str(error)
    pixels = pixels.transpose(1, 2, 0) if decode is decode_tensor else pixels
    assert (pixels.dtype, pixels.shape[2]) == (np.uint8, 3)
    return pixels.shape, pixels.tobytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_is_wrong_with_a_file_is_a_bad_image(kind):
    data = encode(kind)
    assert decode_image(data).mode == "RGB"
    assert outcome(data, decode_tensor) == outcome(data, decode_image)
    choose = random.Random(kind)
    for _ in range(40):
        damaged = bytearray(data[: choose.choice((len(data), choose.randrange(len(data))))])
        for _ in range(choose.randrange(1, 6) if damaged else 0):
            damaged[choose.randrange(min(len(damaged), choose.choice((40, len(damaged)))))] = choose.randrange(256)
        assert outcome(bytes(damaged), decode_tensor) == outcome(bytes(damaged), decode_image)


TURNED = Image.Exif()
TURNED[0x112] = 6  # to be shown turned by 90 degrees, which convert("RGB") does not do


def alpha(mode):
    image = gradient()
    image.putalpha(gradient("L"))
    return image.convert(mode)


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (gradient(), "JPEG", {"quality": 95, "subsampling": 0}),
        (gradient(), "JPEG", {"quality": 30, "progressive": True}),
        (gradient(), "JPEG", {"keep_rgb": True}),
        (gradient(), "JPEG", {"exif": TURNED}),
        (gradient("L"), "JPEG", {}),
        (gradient("CMYK"), "JPEG", {}),
        (gradient(), "MPO", {"save_all": True, "append_images": [gradient("L").convert("RGB")]}),
        (gradient("P"), "PNG", {}),
        (alpha("P"), "PNG", {}),
        (alpha("RGBA"), "PNG", {}),
        (alpha("LA"), "PNG", {}),
        (gradient("I").convert("I;16"), "PNG", {}),
        (gradient("1"), "PNG", {}),
        (alpha("RGBA"), "WEBP", {"lossless": True}),
        (gradient(), "WEBP", {"save_all": True, "append_images": [gradient("L").convert("RGB")]}),
        (gradient(), "GIF", {"save_all": True, "append_images": [gradient("L")]}),
    ],
)
def test_both_decoders_see_the_picture_of_pillow(image, kind, options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    assert outcome(file.getvalue(), decode_tensor) == outcome(file.getvalue(), decode_image)
    expected = np.array(Image.open(file).convert("RGB"))
    assert outcome(file.getvalue(), decode_tensor) == (expected.shape, expected.tobytes())


@pytest.mark.parametrize("decode", [decode_image, decode_tensor])
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((10_000, 5_001), "10000 × 5001 pixels are more than 50 megapixels"),
        ((14_000, 14_000), "Image size .* exceeds limit"),
        ((1, 10_000), "1 × 10000 pixels: one side is over 100 times the other"),
    ],
)
def test_what_is_too_large_is_not_decoded(decode, size, message):
    with pytest.raises(BadImage, match=message):
        decode(png(*size))


def test_what_is_just_small_enough():
    for size in ((10_000, 5_000), (1, 100)):
        assert decode_image(png(*size)).size == size

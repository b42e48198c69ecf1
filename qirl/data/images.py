"""Images from outside: any mode becomes uint8 RGB, and what could harm is refused before a pixel of it is decoded."""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qirl.errors import UserError

PIXELS = 2**26  # of one image at most: 8192 x 8192
TRANSPORT = ("PNG", "WEBP")  # WebP without loss: see _lossy
FILES = ("PNG", "WEBP", "JPEG", "TIFF", "BMP", "GIF")


def decode(data: bytes, what: str, pixels: int = PIXELS) -> np.ndarray:
    """An image that travelled as uint8 [H, W, 3]: turned as EXIF says, transparent places on white, 16 bits scaled to 8.

    what: its name in errors. Raises UserError for what is no PNG or lossless WebP, has more pixels, or is truncated.
    """
    if _lossy(data):
        raise UserError(f"{what} is WebP with loss, or animated; send PNG or lossless WebP")
    with _opened(io.BytesIO(data), what, pixels, TRANSPORT) as image:
        return _rgb(image)


def read_image(path: str | Path, pixels: int = PIXELS) -> np.ndarray:
    """uint8 [H, W, 3] of a file, as `decode` makes it, of any of FILES. Raises UserError for one that is not there, too."""
    with _opened(path, str(path), pixels, FILES) as image:
        return _rgb(image)


def check_image(path: str | Path, pixels: int = PIXELS) -> None:
    """Raises UserError for a file that `read_image` would refuse, as far as its first bytes tell; decodes no pixel."""
    with _opened(path, str(path), pixels, FILES):
        pass


@contextlib.contextmanager
def _opened(source, what: str, pixels: int, formats: tuple[str, ...]) -> Iterator:
    """PIL's image of a path or a stream, with no pixel decoded. What goes wrong in the block is told, too."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            opened = Image.open(source, formats=formats)
        with opened as image:
            width, height = image.size
            if width * height > pixels:
                raise UserError(
                    f"{what} has {width} x {height} pixels, more than the {pixels} that are allowed; scale it down"
                )
            yield image
    except UnidentifiedImageError:
        raise UserError(f"{what} is no image of format {', '.join(formats)}; convert it") from None
    except Image.DecompressionBombError:
        raise UserError(f"{what} has far more pixels than the {pixels} that are allowed; scale it down") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        if reason := getattr(error, "strerror", None):  # of the system, not of what the file holds
            raise UserError(f"{what} cannot be read ({reason}); check the path") from None
        raise UserError(f"{what} is truncated or damaged ({error}); write it again") from None


def _lossy(data: bytes) -> bool:
    """Whether this is WebP with a lossy frame, or animated. RIFF: 12 bytes, then chunks of name, size and padded content."""
    place = 12
    while data[8:12] == b"WEBP" and place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name in (b"VP8 ", b"ANMF"):
            return True
        place += 8 + size + size % 2
    return False


def _rgb(image) -> np.ndarray:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel: PIL would clip them to 255
        values = np.asarray(image, dtype=np.float64)
        values = values / (65535 if values.max(initial=0) > 255 else 255)
        return np.repeat(np.rint(values.clip(0, 1) * 255).astype(np.uint8)[..., None], 3, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def encode(image: np.ndarray, level: int = 0) -> bytes:
    """uint8 [H, W, 3] as PNG; level: zlib's, 0 stores the pixels as they are.

    Written here, without PNG's filters: Pillow tries them all, which takes ten times as long as everything else that a
    sample costs on its way to a scorer.
    """
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # every row begins with its filter: 0, none
    rows[:, 1:] = image.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows.tobytes(), level)) + chunk(b"IEND", b"")


def content_hash(*images: np.ndarray, text: str = "") -> str:
    """sha256 of pixels, shapes and a text."""
    digest = hashlib.sha256(f"{len(text)} {text}".encode())
    for image in images:
        digest.update(f"{image.shape} {image.dtype}".encode() + np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()

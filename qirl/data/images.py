"""Images from outside: any mode becomes uint8 RGB, and what could harm is refused before a pixel of it is decoded.

The range of a pixel's values comes from the file's mode or the array's dtype, never from the values themselves:

    8 bits a channel    0 to 255
    16 bits             0 to 65535, of which 257 make one of 8 bits, rounded; a TIFF of 12 bits: 0 to 4095. Colours of 16 bits
                        come from Pillow as their upper 8
    other               32-bit integers and floats have no range that all writers share: refused
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from qirl.data import dali
from qirl.errors import UserError

PIXELS = 2**26  # of one image at most: 8192 x 8192
MOST_ASPECT = 200  # Qwen-VL's image processors take no image whose longer side is more times the shorter one
TRANSPORT = ("PNG", "WEBP")  # WebP without loss: see _lossy
FILES = ("PNG", "WEBP", "JPEG", "TIFF", "BMP", "GIF")
PHOTOMETRIC, BITS = 262, 258  # tags of TIFF: whether 0 is white, and bits of each channel
ORIENTATION = 274  # tag of EXIF: how the pixels of a file lie
TURNS = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: lambda x: np.rot90(x),
}  # fmt: skip
SCALE = "scale its black to 0 and its white to 255 (uint8) or 65535 (uint16) and save it again"


def decode(data: bytes, what: str, pixels: int = PIXELS) -> np.ndarray:
    """An image that travelled as uint8 [H, W, 3]: turned as EXIF says, transparent places on white, 16 bits scaled to 8.

    what: its name in errors. Raises UserError for what is no PNG or lossless WebP, has more pixels, or is truncated, and where
    the mode does not say which value is white.
    """
    if _lossy(data):
        raise UserError(f"{what} is WebP with loss, or animated; send PNG or lossless WebP")
    with _opened(io.BytesIO(data), what, pixels, TRANSPORT) as image:
        return _rgb(image, what)


@dataclass(frozen=True)
class Slice:
    """A file inside of another that is not compressed, such as a tar."""

    path: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read_image(path: str | Path | Slice, pixels: int = PIXELS) -> np.ndarray:
    """uint8 [H, W, 3] of a file, as `decode` makes it, of any of FILES. Raises UserError for one that is not there, too."""
    source = io.BytesIO(path.read()) if isinstance(path, Slice) else path
    with _opened(source, str(path), pixels, FILES) as image:
        return _rgb(image, str(path))


def read_images(files: Sequence[Path | Slice], decoder: str = "pil") -> Iterator[np.ndarray | UserError]:
    """What `read_image` makes of every file, in their order, or the UserError that it raises; on all cores.

    decoder: "pil", "dali" (`qirl.data.dali`), or "auto", which is DALI where it is installed. The pixels are the same.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if decoder == "pil" or decoder == "auto" and not dali.installed():
            yield from pool.map(_tried, files)
            return
        for start in range(0, len(files), dali.BATCH):
            batch = files[start : start + dali.BATCH]
            jpegs = {place: found for place, found in enumerate(pool.map(_jpeg, batch)) if found is not None}
            images = dali.decode([data for data, _ in jpegs.values()]) if jpegs else []
            if images is None:  # one of them is damaged: Pillow says which
                jpegs, images = {}, []
            turned = (np.ascontiguousarray(TURNS[way](x)) for x, (_, way) in zip(images, jpegs.values(), strict=True))
            known = dict(zip(jpegs, turned, strict=True))
            others = iter(pool.map(_tried, [file for place, file in enumerate(batch) if place not in known]))
            yield from (known[place] if place in known else next(others) for place in range(len(batch)))


def _tried(file: Path | Slice) -> np.ndarray | UserError:
    try:
        return read_image(file)
    except UserError as error:
        return error


def _jpeg(file: Path | Slice) -> tuple[bytes, int] | None:
    """Content and EXIF orientation of a JPEG that DALI decodes as Pillow does; None for any other file."""
    try:
        data = file.read() if isinstance(file, Slice) else Path(file).read_bytes()
        with _opened(io.BytesIO(data), str(file), PIXELS, FILES) as image:
            if image.format != "JPEG" or image.mode not in ("RGB", "L") or not dali.intact(data):
                return None
            way = image.getexif().get(ORIENTATION, 1)
            return data, way if way in TURNS else 1
    except (OSError, UserError):  # `read_image` says what is wrong
        return None


class Pictures(Sequence):
    """Images of files, uint8 [H, W, 3], read when they are asked for; the last few of all stay in memory."""

    def __init__(self, files: Sequence[Path | Slice]):
        self.files = tuple(files)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image in pixels."""
        return [image.shape[:2] for image in self]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [_remembered(file, written(file)) for file in self.files[place]]
        return _remembered(self.files[place], written(self.files[place]))


def written(file: Path | Slice) -> tuple[int, int] | None:
    """When a file was written, in nanoseconds, and its size; None where there is none."""
    path = file.path if isinstance(file, Slice) else file
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@lru_cache(64)
def _remembered(file: Path | Slice, stamp: tuple[int, int] | None) -> np.ndarray:
    return read_image(file)


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
    except UserError:  # a ValueError, too
        raise
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


def as_uint8(given, what: str) -> np.ndarray:
    """uint8 [H, W, 3] of an array or tensor [H, W, 3]: uint8 as it is, uint16 (0 to 65535) divided by 257 and rounded.

    Raises UserError for another shape or dtype: a float does not say whether its white is 1 or 255.
    """
    if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.ndim == 3 and given.shape[2] == 3:
        return given
    array = given.detach().cpu().numpy() if hasattr(given, "detach") else np.asarray(given)
    if array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f"{what} has the shape {list(array.shape)}; give [height, width, 3], in RGB")
    if array.dtype == np.uint16:
        return _eight_bits(array, 65535)
    if array.dtype != np.uint8:
        raise UserError(
            f"{what} is of dtype {array.dtype}, which does not say which value is white; scale it to 0 .. 255 and give uint8"
        )
    return array


def _eight_bits(values: np.ndarray, white: int) -> np.ndarray:
    """values in 0 .. white as uint8, rounded."""
    return np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)


def _white(image, what: str) -> int | None:
    """The value of white in a grey image of more than 8 bits; None where PIL's mode has 8. Decodes no pixel.

    Raises UserError for 32-bit integers and floats, whose range the file does not say.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):  # Pillow before 11.3 opens a PNG so
        return 2 ** tags.get(BITS, (16,))[0] - 1
    if image.mode.startswith(("I", "F")):
        kind = "floats" if image.mode.startswith("F") else f"{'/'.join(map(str, tags.get(BITS, (32,))))}-bit integers"
        raise UserError(f"{what} holds {kind} (mode {image.mode}), which do not say which value is white; {SCALE}")
    return None


def _rgb(image, what: str) -> np.ndarray:
    from PIL import Image, ImageOps

    white, inverted = _white(image, what), getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
    clear = image.info.get("transparency")
    image = ImageOps.exif_transpose(image)
    if white is not None:
        values = np.asarray(image)
        values = white - values if inverted else values
        values = np.where(values == clear, white, values) if isinstance(clear, int) else values
        return np.repeat(_eight_bits(values, white)[..., None], 3, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # PIL has no conversion
        raise UserError(f"{what} is of mode LAB; convert it to RGB")
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

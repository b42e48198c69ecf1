"""Images of files by DALI against Pillow: the same pixels, the same refusals."""

import io

import numpy as np
import pytest
from PIL import Image

from qirl.config_sections import World
from qirl.data import dali, images
from qirl.data.images import ORIENTATION, TURNS, read_image, read_images
from qirl.data.prompt_file import PromptFile
from qirl.data.prompts import LAST
from qirl.errors import UserError

with_dali = pytest.mark.skipif(
    not dali.installed(), reason="nvidia-dali-cuda130 is not installed: pip install 'qirl[dali]'"
)


def photo(height=67, width=91, seed=0):
    """Smooth colours with noise: every DCT coefficient is in use."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([np.sin(x / 50 + y / 90), np.cos(x / 33), np.sin(y / 21)], -1) * 90 + 128
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def saved(image, kind="JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(way, thumbnail=False):
    exif = Image.Exif()
    exif[ORIENTATION] = way
    if thumbnail:  # a whole JPEG inside of the header
        small = saved(photo(12, 16))
        exif._ifds[1] = {0x0103: 6, 0x0201: 0, 0x0202: len(small)}
        return saved(photo(), exif=exif.tobytes() + small)
    return saved(photo(), exif=exif)


JPEGS = {
    "4:4:4": saved(photo(), quality=95, subsampling=0), "4:2:2": saved(photo(), subsampling=1), "4:2:0": saved(photo(), quality=75),
    "coarse": saved(photo(), quality=5), "progressive": saved(photo(), progressive=True), "grey": saved(photo().convert("L")),
    "restarts": saved(photo(), restart_marker_blocks=2), "no YCbCr": saved(photo(), keep_rgb=True), "one pixel": saved(photo(1, 1)),
    "one column": saved(photo(33, 1)), "large": saved(photo(700, 500)), "with a thumbnail": turned(6, thumbnail=True),
} | {f"turned {way}": turned(way) for way in (*TURNS, 0, 9)}  # fmt: skip
OTHERS = {
    "CMYK": saved(photo().convert("CMYK")), "RGB PNG": saved(photo(), "PNG"), "lossy WebP": saved(photo(), "WEBP"),
    "RGBA": saved(photo().convert("RGBA").rotate(20), "PNG"), "palette": saved(photo().convert("P"), "PNG", transparency=0),
    "16 bits": saved(Image.fromarray(np.arange(0, 60000, 60, dtype=np.uint16).reshape(20, 50)), "PNG"),
    "GIF": saved(photo().convert("P"), "GIF"), "TIFF": saved(photo(), "TIFF"),
}  # fmt: skip


def written(folder, contents):
    paths = []
    for place, data in enumerate(contents):
        paths.append(folder / f"{place}.jpg")
        paths[-1].write_bytes(data)
    return paths


@with_dali
def test_jpegs_have_the_pixels_of_pillow_and_never_see_it(tmp_path, monkeypatch):
    paths = written(tmp_path, JPEGS.values())
    wanted = [read_image(path) for path in paths]
    monkeypatch.setattr(images, "read_image", None)  # would fail
    for name, own, found in zip(JPEGS, wanted, read_images(paths, "dali"), strict=True):
        assert found.dtype == np.uint8 and np.array_equal(found, own), name


@with_dali
def test_what_dali_does_otherwise_goes_through_pillow(tmp_path):
    """More files than a batch, of all kinds between each other."""
    paths = written(tmp_path, [*JPEGS.values(), *OTHERS.values()] * 2)
    assert len(paths) > dali.BATCH
    for path, found in zip(paths, read_images(paths, "auto"), strict=True):
        assert np.array_equal(found, read_image(path)), path
    assert {path: images._jpeg(path) for path in written(tmp_path, OTHERS.values())} == dict.fromkeys(
        written(tmp_path, OTHERS.values())
    )


def damaged(seed):
    """A JPEG with some bytes changed, and perhaps its end lost."""
    draw = np.random.default_rng(seed)
    data = bytearray(list(JPEGS.values())[seed % 8])
    for _ in range(draw.integers(1, 4)):
        data[draw.integers(20, len(data) - 2)] = draw.integers(256)
    return bytes(data[: draw.integers(30, len(data))] if seed % 5 == 0 else data)


def read(path):
    try:
        return read_image(path)
    except UserError as error:
        return error


@with_dali
def test_damaged_files_are_told_as_pillow_tells_them_and_spare_the_others(tmp_path):
    contents = [data for seed in range(64) for data in (damaged(seed), JPEGS["4:2:0"])]
    paths, refused = written(tmp_path, contents), 0
    for path, found in zip(paths, read_images(paths, "dali"), strict=True):
        wanted = read(path)
        refused += isinstance(wanted, UserError)
        assert str(found) == str(wanted) if isinstance(wanted, UserError) else np.array_equal(found, wanted)
    assert 10 < refused < 60


@with_dali
def test_a_file_that_only_decoding_shows_to_be_damaged_does_not_end_its_batch(tmp_path):
    whole, broken = JPEGS["4:2:0"], bytearray(JPEGS["4:2:0"])
    table = broken.find(b"\xff\xc4") + 5
    broken[table : table + 4] = b"\xff" * 4  # of its Huffman codes
    assert dali.intact(bytes(broken)) and dali.decode([whole, bytes(broken)]) is None
    found = list(read_images(written(tmp_path, [whole, broken, whole]), "dali"))
    assert str(found[1]) == str(read(tmp_path / "1.jpg")) and "is truncated or damaged" in str(found[1])
    assert all(np.array_equal(found[place], read_image(tmp_path / "0.jpg")) for place in (0, 2))
    assert len(dali.decode([whole])) == 1  # and it goes on


class Square:
    """A family as far as data knows it."""

    pixels = 16

    def check(self, prompt):
        pass

    def size(self, prompt):
        return 4, 2


@with_dali
def test_prompts_of_both_decoders_are_the_same(tmp_path):
    written(tmp_path, [JPEGS["turned 6"], OTHERS["RGBA"], JPEGS["grey"], JPEGS["4:2:0"][:500]])
    rows = [f'{{"text": "edit {i}", "sources": ["{i}.jpg"], "image": "{i}.jpg"}}\n' for i in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(rows[:3]))
    (tmp_path / "bad.jsonl").write_text("".join(rows))
    shown, said = {}, {}
    for decoder in ("pil", "dali"):
        LAST.clear()
        own = PromptFile("edit", Square(), decoder=decoder)
        sizes = [p.source_sizes for p in own.prompts("train", tmp_path / "p.jsonl")]
        shown[decoder] = sizes, [image.tolist() for image in own.examples(np.array([[0.0], [0.4], [0.9]]))[1]]
        with pytest.raises(UserError) as error:
            own.prompts("train", tmp_path / "bad.jsonl")
        said[decoder] = str(error.value)
    assert shown["pil"] == shown["dali"] and shown["pil"][0] == [[(91, 67)], [(67, 91)], [(67, 91)]]
    assert said["pil"] == said["dali"] and "bad.jsonl:4: " in said["pil"] and "is truncated or damaged" in said["pil"]


@pytest.mark.skipif(dali.installed(), reason="DALI is installed")
def test_dali_is_refused_where_it_is_missing_and_auto_is_pillow(tmp_path):
    with pytest.raises(UserError, match=r"world.decoder=dali needs nvidia-dali-cuda130.*pip install 'qirl\[dali\]'"):
        PromptFile("t2i", Square(), decoder="dali")
    (found,) = read_images(written(tmp_path, [JPEGS["turned 6"]]), "auto")
    assert np.array_equal(found, read_image(tmp_path / "0.jpg"))


def test_pillow_is_the_default():
    assert World().decoder == "pil"

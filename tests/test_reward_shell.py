"""Images of any kind, and `qirl reward score | check | serve` as a user types them."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

from qirl.data.images import as_uint8, content_hash, decode, encode, read_image
from qirl.data.prompts import Prompt
from qirl.errors import UserError
from qirl.rewards.attacks import ATTACKS
from qirl.rewards.protocol import Sample
from qirl.rewards.shell import beaten, read_samples

RAMP = np.stack(np.broadcast_arrays(np.arange(12)[:, None] * 20, np.arange(9) * 25, np.uint8(7)), -1).astype(np.uint8)


def saved(image, form="PNG", **more):
    buffer = io.BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


# images


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_lossless_transport_keeps_every_pixel(form):
    assert np.array_equal(
        decode(saved(Image.fromarray(RAMP), form, **({"lossless": True} if form == "WEBP" else {})), "x"), RAMP
    )
    assert np.array_equal(decode(encode(RAMP), "x"), RAMP)


def test_transparency_lies_on_white():
    rgba = np.dstack([RAMP, np.full(RAMP.shape[:2], 255, np.uint8)])
    rgba[0, 0, 3] = 0
    found = decode(saved(Image.fromarray(rgba)), "x")
    assert found[0, 0].tolist() == [255, 255, 255] and np.array_equal(found[1:], RAMP[1:])


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "CMYK", "I;16"])
def test_other_modes_become_rgb(tmp_path, mode):
    grey = Image.fromarray(RAMP).convert("L")
    image = (
        Image.fromarray(np.asarray(grey, np.uint16) * 257) if mode == "I;16" else Image.fromarray(RAMP).convert(mode)
    )
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    image.save(path)
    found = read_image(path)
    assert found.dtype == np.uint8 and found.shape == RAMP.shape
    if mode in ("L", "LA", "I;16"):
        assert np.array_equal(found, np.repeat(np.asarray(grey)[..., None], 3, -1))


@pytest.mark.parametrize("brightest", [255, 256, 65535])
@pytest.mark.parametrize("name", ["x.png", "x.tif", "big-endian.tif"])
def test_sixteen_bits_have_one_range_whatever_the_picture_shows(tmp_path, name, brightest):
    values = np.array([[0, 200], [100, brightest]], np.uint16)
    if name.startswith("big"):
        (tmp_path / name).write_bytes(tiff(values.astype(">u2"), order="MM"))
    else:
        Image.fromarray(values).save(tmp_path / name)
    wanted = np.rint(values / 257).astype(int).tolist()
    assert read_image(tmp_path / name)[..., 0].tolist() == wanted
    if name == "x.png":
        assert decode((tmp_path / name).read_bytes(), "x")[..., 2].tolist() == wanted


def tiff(pixels, order="II", bits=16, photometric=1, size=None):
    """A grey TIFF of one strip, written out field by field."""
    pack = {"II": "<", "MM": ">"}[order]
    (height, width), data = size or pixels.shape, pixels.tobytes()
    fields = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    head = order.encode() + struct.pack(pack + "HI", 42, 8 + len(data)) + data
    entries = [struct.pack(pack + "HHIHH", tag, 3, 1, value, 0) for tag, value in fields]
    entries.append(struct.pack(pack + "HHII", 279, 4, 1, len(data)))
    return head + struct.pack(pack + "H", len(entries)) + b"".join(entries) + bytes(4)


def test_a_tiff_says_its_bits_and_whether_zero_is_white(tmp_path):
    twelve = np.array(
        [0x00, 0x0F, 0xFF, 0x80, 0x00, 0x01], np.uint8
    )  # 0, 4095 | 2048, 1: three hex digits a pixel, a row 3 bytes
    (tmp_path / "12.tif").write_bytes(tiff(twelve, bits=12, size=(2, 2)))
    assert read_image(tmp_path / "12.tif")[..., 0].tolist() == [[0, 255], [128, 0]]
    (tmp_path / "0.tif").write_bytes(tiff(np.array([[0, 65535]], "<u2"), photometric=0))
    assert read_image(tmp_path / "0.tif")[..., 0].tolist() == [[255, 0]]


def test_a_clear_grey_of_sixteen_bits_is_white(tmp_path):
    Image.fromarray(np.array([[0, 514]], np.uint16)).save(tmp_path / "x.png", transparency=0)
    assert read_image(tmp_path / "x.png")[..., 0].tolist() == [[255, 2]]


@pytest.mark.parametrize("dtype,kind", [(np.float32, "floats .mode F."), (np.int32, "32-bit integers .mode I.")])
def test_pixels_without_a_range_are_refused(tmp_path, dtype, kind):
    path = tmp_path / "x.tif"
    for values in ([[0, 1], [0.5, 0.25]], [[np.nan, 1]]) if dtype == np.float32 else ([[0, 255]],):
        Image.fromarray(np.array(values, dtype)).save(path)
        with pytest.raises(UserError, match=f"^{path} holds {kind}, which do not say .* white to 255 .uint8. or 65535"):
            read_image(path)


def test_lab_is_refused_as_such(tmp_path):
    Image.new("LAB", (2, 2)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match="x.tif is of mode LAB; convert it to RGB"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("of", [as_uint8, lambda image, what: Sample(0, 0, "p", image).image,
                                lambda image, what: Sample(0, 0, "p", RAMP, sources=(image,)).sources[0],
                                lambda image, what: Prompt(0, "p", sources=(image,)).sources[0]],
                         ids=["array", "image of a sample", "source of a sample", "source of a prompt"])  # fmt: skip
def test_arrays_have_the_range_of_their_dtype(of):
    dark = np.full((2, 2, 3), 200, np.uint16)
    assert of(RAMP, "x") is RAMP
    assert np.array_equal(of(torch.from_numpy(RAMP), "x"), RAMP)
    for given, wanted in ((dark, 1), (torch.from_numpy(dark), 1), (dark * 0 + 65535, 255)):
        found = of(given, "x")
        assert found.dtype == np.uint8 and (found == wanted).all()
    for given in (RAMP / 255, torch.from_numpy(RAMP).float(), RAMP.astype(np.int64), RAMP > 0):
        with pytest.raises(UserError, match="which does not say which value is white"):
            of(given, "x")
    for given in (RAMP[..., 0], RAMP.transpose(2, 0, 1), np.dstack([RAMP, RAMP])):
        with pytest.raises(UserError, match="give .height, width, 3., in RGB"):
            of(given, "x")


def test_exif_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(RAMP).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "x.png"), np.rot90(RAMP, -1))


@pytest.mark.parametrize(
    "data,message",
    [
        (b"", "is no image of format"),
        (b"GIF89a" + bytes(40), "is no image of format PNG, WEBP"),
        (saved(Image.fromarray(RAMP))[:60], "is truncated or damaged"),
        (saved(Image.new("1", (9_000, 9_000))), "^picture 3 has 9000 x 9000 pixels, more than"),
        (saved(Image.new("1", (40_000, 40_000))), "far more pixels than"),
    ],
    ids=["empty", "another format", "truncated", "large", "bomb"],
)
def test_what_cannot_be_taken_is_told(data, message):
    with pytest.raises(UserError, match=message):
        decode(data, "picture 3")


def test_webp_travels_without_loss_alone(tmp_path):
    image = Image.fromarray(RAMP)
    clear = Image.fromarray(np.dstack([RAMP, np.full(RAMP.shape[:2], 200, np.uint8)]))
    lossy = (
        saved(image, "WEBP"),
        saved(clear, "WEBP"),
        saved(image, "WEBP", lossless=True, save_all=True, append_images=[clear]),
    )
    for data in lossy:
        with pytest.raises(UserError, match="picture 3 is WebP with loss, or animated"):
            decode(data, "picture 3")
        (tmp_path / "x.webp").write_bytes(data)
        assert read_image(tmp_path / "x.webp").shape == RAMP.shape
    turned = image.getexif()
    turned[0x0112] = 3
    assert np.array_equal(decode(saved(image, "WEBP", lossless=True, exif=turned), "x"), RAMP[::-1, ::-1])


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match="no.png cannot be read"):
        read_image(tmp_path / "no.png")


def test_hashes_are_of_content():
    assert content_hash(RAMP, text="a") == content_hash(RAMP.copy(), text="a")
    others = [
        content_hash(RAMP, text="b"),
        content_hash(RAMP.swapaxes(0, 1), text="a"),
        content_hash(RAMP[:6], RAMP[6:], text="a"),
    ]
    assert len({content_hash(RAMP, text="a"), *others}) == 4


# attacks


@pytest.mark.parametrize("size", [(16, 16), (31, 200), (1, 1)])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_keeps_the_size_and_repeats(name, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    sample = Sample(3, 0, "a cat", image, sources=(image[::-1],))
    found = ATTACKS[name](sample)
    assert found.shape == image.shape and found.dtype == np.uint8 and np.array_equal(found, ATTACKS[name](sample))
    assert name != "copied source" or np.array_equal(found, image[::-1])


def test_attacks_are_what_they_are_called():
    image = np.random.default_rng(0).integers(60, 196, (64, 256, 3), dtype=np.uint8)
    sample = Sample(3, 0, "a cat", image)
    made = {name: make(sample) for name, make in ATTACKS.items()}
    assert made["blank"].std((0, 1)).max() == 0 and made["copied source"] is None
    assert np.array_equal(made["tiles"][:32, :128], image[::2, ::2]) and np.array_equal(
        made["tiles"][32:, 128:], image[::2, ::2]
    )
    assert (np.abs(made["pattern"].astype(int) - image) == 48).all()
    assert 50 < (made["demand"] < 128).all(-1).sum() and (made["written on"] != image).any()


def test_beaten_counts_ties_half():
    assert beaten([0.5], [0.1, 0.5, 0.9, 0.9]) == pytest.approx(1.5 / 4)
    assert np.isnan(beaten([float("nan")], [0.5]))


# the shell


def brightness(samples):
    """Bright pictures score well: a reward that a white page hacks."""
    return [{"bright": float(s.image.mean() / 255)} for s in samples]


def plain(samples):
    """Scores only what looks like the ramp."""
    return [{"plain": float(np.array_equal(s.image[-1, -1], RAMP[-1, -1]))} for s in samples]


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        Image.fromarray(RAMP // (i + 2)).save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("a ramp\n")
    return tmp_path


def config_of(folder, *functions):
    rewards = {f: {"kind": "python", "target": f"test_reward_shell:{f}"} for f in functions}
    path = folder / "c.yaml"
    path.write_text(json.dumps({"rewards": rewards, "serve": {"port": 0}}))
    return path


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}


def qirl(*words):
    return subprocess.run([sys.executable, "-m", "qirl", "reward", *map(str, words)], capture_output=True, text=True,
                          env=environment(), timeout=120)  # fmt: skip


def test_a_folder_is_scored_with_its_prompts(folder):
    samples, names = read_samples(folder)
    assert names == ["0.png", "1.png", "2.png", "3.png"] and [s.prompt for s in samples] == ["a ramp", "", "", ""]
    done = qirl("score", config_of(folder, "brightness"), folder)
    assert done.returncode == 0, done.stderr
    assert "bright" in done.stdout and "4 images" in done.stdout
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == names
    assert rows[1]["scores"]["bright"] == pytest.approx((RAMP // 3).mean() / 255)


def test_records_are_scored_with_their_sources(folder):
    path = folder / "in.jsonl"
    path.write_text(json.dumps({"image": "1.png", "prompt": "darker", "sources": ["0.png"], "category": "edit"}) + "\n")
    (sample,), _ = read_samples(path)
    assert sample.task == "edit" and sample.category == "edit" and np.array_equal(sample.sources[0], RAMP // 2)


def test_a_hacked_reward_is_found_and_a_sound_one_passes(folder):
    done = qirl("check", config_of(folder, "brightness"), folder)
    assert done.returncode == 1 and "too high" in done.stdout and "demand" in done.stdout, done.stdout + done.stderr
    done = qirl("check", config_of(folder, "plain"), folder, "--limit", "0.6")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda f: (f / "0.png").write_bytes(b"x"), "0.png is no image"),
        (lambda f: [p.unlink() for p in f.glob("*.png")], "has no image to score"),
    ],
)
def test_a_bad_folder_is_one_line_and_exit_code_two(folder, change, message):
    config = config_of(folder, "brightness")
    change(folder)
    done = qirl("score", config, folder)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("line,message", [("{", "in.jsonl:1: not JSON"), ('{"prompt": "x"}', "there must be an image"),
                                          ('{"image": "0.png", "promt": "x"}', "'promt' is no field"),
                                          ('{"image": "0.png", "sources": [3]}', "must list paths")])  # fmt: skip
def test_bad_records_are_told_with_their_line(folder, line, message):
    (folder / "in.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        read_samples(folder / "in.jsonl")


def test_a_served_config_answers_and_ends_on_sigterm(folder, unused_port):
    command = [
        sys.executable,
        "-m",
        "qirl",
        "reward",
        "serve",
        str(config_of(folder, "brightness")),
        f"serve.port={unused_port}",
    ]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{unused_port}"
        for _ in range(200):
            try:
                if httpx2.get(f"{address}/health/ready").status_code == 200:
                    break
            except httpx2.HTTPError:
                time.sleep(0.1)
        remote = folder / "remote.yaml"
        remote.write_text(json.dumps({"rewards": {"r": {"kind": "server", "servers": [address]}}}))
        done = qirl("score", remote, folder)
        assert done.returncode == 0 and "bright" in done.stdout, done.stderr
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (0, -signal.SIGTERM, 143)
    assert f"serving brightness on {address}" in process.stdout.read()


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def test_a_server_without_its_function_says_so(folder):
    config = folder / "c.yaml"
    config.write_text(json.dumps({"rewards": {"a": {"kind": "python", "target": "nothing_here:f"}}}))
    done = qirl("serve", config)
    assert done.returncode == 2 and "nothing_here:f cannot be imported" in done.stderr

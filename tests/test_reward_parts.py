"""The ready-made components against independent computations, with small random networks of transformers."""

import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_rewards import save_clip, save_dino

from qirl import config_parts as options
from qirl.config import load
from qirl.errors import UserError
from qirl.rewards.parts import embedding, faces, ocr, pixels
from qirl.rewards.parts.faces import Face, FaceIdentity
from qirl.rewards.protocol import Sample
from qirl.rewards.registry import build

DRAW = np.random.default_rng(0)


def picture(height=32, width=32):
    return DRAW.integers(0, 256, (height, width, 3), dtype=np.uint8)


def sample(i=0, prompt="a red cat", image=None, prompt_id=0, **more):
    return Sample(i, prompt_id, prompt, picture() if image is None else image, **more)


# networks


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return save_dino(tmp_path_factory.mktemp("dino"))


def logits(folder, given):
    """transformers' own logits per pair: scaled cosines of image and text."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")([s.image for s in given], return_tensors="pt")
    texts = AutoTokenizer.from_pretrained(folder)([s.prompt for s in given], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**images, **texts).logits_per_image.diagonal(), model.logit_scale.exp().item()


def test_clip_score_is_the_cosine_between_its_ends(clip):
    given = [sample(i, p) for i, p in enumerate(["a red cat", "a blue dog", "cat", "  "])]
    reward = embedding.ClipScore("c", options.ClipScoreOptions(model=str(clip), low=-1.0, high=1.0, batch=2))
    rows = reward(given)
    wanted, scale = logits(clip, given[:3])
    assert rows[3] == {}
    for row, cosine in zip(rows, (wanted / scale).tolist(), strict=False):
        assert row["c"] == pytest.approx((cosine + 1) / 2, abs=1e-5)


def test_pick_score_is_the_scaled_cosine(clip):
    given = [sample(i, "a cat") for i in range(3)]
    reward = embedding.PickScore("p", options.PickScoreOptions(model=str(clip), low=-20.0, high=20.0))
    wanted, _ = logits(clip, given)
    for row, value in zip(reward(given), wanted.tolist(), strict=True):
        assert row["p"] == pytest.approx((value + 20) / 40, abs=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("widths", [(16, 1), (16, 8, 4, 1)])
def test_the_aesthetic_head_is_its_layers(clip, tmp_path, suffix, widths):
    layers = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)))
    path = tmp_path / f"head{suffix}"
    state = {f"layers.{k}": v.detach().clone() for k, v in layers.state_dict().items()}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    reward = embedding.Aesthetic("a", options.AestheticOptions(model=str(clip), head=str(path), low=-2.0, high=2.0))
    given = [sample(i) for i in range(2)]
    with torch.no_grad():
        wanted = layers(reward.embed.of_images([s.image for s in given]))[:, 0]
    for row, value in zip(reward(given), wanted.tolist(), strict=True):
        assert row["a"] == pytest.approx((value + 2) / 4, abs=1e-5)


@pytest.mark.parametrize("which", ["clip", "dino"])
def test_a_copied_source_is_as_similar_as_can_be(which, request):
    folder = request.getfixturevalue(which)
    same, other = picture(), picture()
    reward = embedding.Similarity("s", options.SimilarityOptions(model=str(folder)))
    rows = reward([sample(image=same, sources=(same,)), sample(image=other, sources=(same, other)), sample()])
    assert rows[0]["s"] == pytest.approx(1.0, abs=1e-5) and rows[1]["s"] < 1 and rows[2] == {}


def test_a_dino_cosine_is_that_of_the_class_token(dino):
    from transformers import AutoImageProcessor, Dinov2Model

    a, b = picture(), picture()
    pixels_of = AutoImageProcessor.from_pretrained(dino, backend="pil")([a, b], return_tensors="pt")
    with torch.no_grad():
        tokens = Dinov2Model.from_pretrained(dino).eval()(**pixels_of).last_hidden_state[:, 0]
    cosine = torch.cosine_similarity(tokens[:1], tokens[1:]).item()
    reward = embedding.Similarity("s", options.SimilarityOptions(model=str(dino), low=-1.0))
    assert reward([sample(image=a, sources=(b,))])[0]["s"] == pytest.approx((cosine + 1) / 2, abs=1e-5)


def test_threads_share_one_network(clip):
    reward = embedding.ClipScore("c", options.ClipScoreOptions(model=str(clip), low=-1.0))
    given = [[sample(i, "a cat") for i in range(4)] for _ in range(6)]
    alone, found = [reward(g) for g in given], [None] * 6
    threads = [threading.Thread(target=lambda k=k: found.__setitem__(k, reward(given[k]))) for k in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert found == alone


def test_weights_that_do_not_fit_are_told(clip, dino, tmp_path):
    with pytest.raises(UserError, match="has no weights"):
        embedding.ClipScore("c", options.ClipScoreOptions(model=str(tmp_path)))
    with pytest.raises(UserError, match="is no CLIP model"):
        embedding.ClipScore("c", options.ClipScoreOptions(model=str(dino)))
    torch.save({"layers.0.weight": torch.zeros(1, 8), "layers.0.bias": torch.zeros(1)}, tmp_path / "h.pth")
    with pytest.raises(UserError, match="takes embeddings of width 8, .* gives 16"):
        embedding.Aesthetic("a", options.AestheticOptions(model=str(clip), head=str(tmp_path / "h.pth")))
    torch.save({"x.weight": torch.zeros(3, 8), "x.bias": torch.zeros(3)}, tmp_path / "h.pth")
    with pytest.raises(UserError, match="do not lead to one rating"):
        embedding.load_head(str(tmp_path / "h.pth"))


# pixels


def outside(**more):
    return pixels.Outside("o", options.OutsideOptions(**more))


def test_ssim_counts_outside_the_mask_alone():
    source = picture(48, 40)
    edited = source.copy()
    edited[10:20, 10:20] = 255 - edited[10:20, 10:20]
    mask = np.zeros((48, 40), bool)
    mask[4:26, 4:26] = True  # the window of SSIM reaches five pixels further
    kept, seen = (
        outside()([sample(image=edited, sources=(source,), metadata=m)])[0]["o"] for m in ({"mask": mask}, {})
    )
    assert kept == pytest.approx(1.0, abs=1e-6) and seen < 0.95
    assert outside()([sample(), sample(image=edited, sources=(source[:20],))]) == [{}, {}]


def test_ssim_is_the_published_one_at_a_pixel():
    """Against the formula written out: a Gaussian window of 11 pixels and sigma 1.5."""
    a, b = (DRAW.integers(0, 256, (32, 32), dtype=np.uint8) for _ in range(2))
    x = np.arange(11) - 5
    window = np.exp(-(x[:, None] ** 2 + x**2) / (2 * 1.5**2))
    window /= window.sum()
    p, q = a[5:16, 5:16] / 255, b[5:16, 5:16] / 255
    mp, mq = (window * p).sum(), (window * q).sum()
    vp, vq, cov = (window * p * p).sum() - mp**2, (window * q * q).sum() - mq**2, (window * p * q).sum() - mp * mq
    wanted = (2 * mp * mq + 0.01**2) * (2 * cov + 0.03**2) / ((mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2))
    mask = np.ones((32, 32), bool)
    mask[10, 10] = False
    images = [np.repeat(g[..., None], 3, -1) for g in (a, b)]
    given = sample(image=images[0], sources=(images[1],), metadata={"mask": mask})
    assert outside(low=-1.0).measure(given) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    "mask,message", [(np.zeros((5, 5)), "they must be of one size"), (np.ones((32, 32)), "nothing is left")]
)
def test_a_mask_that_cannot_be_is_told(mask, message):
    with pytest.raises(UserError, match=message):
        outside()([sample(sources=(picture(),), metadata={"mask": mask})])


def test_lpips_without_torchvision_says_where_to_run_it():
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        with pytest.raises(UserError, match="qirl reward serve"):
            outside(measure="lpips")


def test_a_grid_is_an_artifact_and_a_soft_picture_is_none():
    y, x = np.mgrid[:64, :64]
    soft = np.repeat((128 + 60 * np.sin(x / 20) * np.cos(y / 25))[..., None], 3, -1).astype(np.uint8)
    grid = np.where(((x % 4 == 0) | (y % 4 == 0))[..., None], 255, soft).astype(np.uint8)
    reward = pixels.Artifacts("a", options.ArtifactOptions())
    a, b, small = reward([sample(image=soft), sample(image=grid), sample(image=picture(4, 9))])
    assert a["a"] > b["a"] and small == {}


def test_diversity_is_what_an_image_adds_to_its_group():
    same, far = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    given = [sample(0, image=same, prompt_id=1), sample(1, image=far, prompt_id=1), sample(2, image=same, prompt_id=1),
             sample(3, image=far, prompt_id=2)]  # fmt: skip
    rows = pixels.Diversity("d", options.DiversityOptions(high=1.0))(given)
    assert [row.get("d") for row in rows] == [0.5, 1.0, 0.5, None]


# text


def page(*lines, size=40):
    image = Image.new("RGB", (420, 30 + 70 * len(lines)), "white")
    for k, line in enumerate(lines):
        ImageDraw.Draw(image).text((20, 15 + 70 * k), line, fill="black", font_size=size)
    return np.asarray(image)


@pytest.fixture(scope="module")
def reader():
    return ocr.Ocr("t", options.OcrOptions())


def test_written_text_is_read_and_another_is_not(reader):
    image = page("HELLO WORLD", "Room 42")
    given = [sample(prompt='a sign that says "hello world" and "Room 42"', image=image),
             sample(prompt='a sign that says "GOODBYE"', image=image), sample(prompt="a sign", image=image),
             sample(prompt='"anything"', image=np.full((64, 64, 3), 255, np.uint8))]  # fmt: skip
    rows = reader(given)
    assert rows[0]["t"] > 0.95 and rows[1]["t"] < 0.5 and rows[2] == {} and rows[3]["t"] == 0


@pytest.mark.parametrize(
    "wanted,read,similarity",
    [
        ("abc", "xxabcxx", 1),
        ("abc", "xxabxx", 2 / 3),
        ("abc", "", 0),
        ("abcd", "axcd", 3 / 4),
        ("你好", "说你好吗", 1),
        ("你好", "你们", 0.5),
    ],
)
def test_edit_similarity_is_to_the_nearest_window(wanted, read, similarity):
    assert ocr.edit_similarity(wanted, read) == pytest.approx(similarity)


def test_several_texts_weigh_by_their_length(reader):
    assert reader.score(["abcdef", "xy"], "abcdef") == pytest.approx(6 / 8)
    exact = ocr.Ocr("t", options.OcrOptions(form="exact", case=True))
    assert exact.score(["Ab", "Cd"], "A b c d") == 0.5


@pytest.mark.parametrize(
    "prompt,texts",
    [
        ('a "Cat" and “dog”', ["Cat", "dog"]), ("写着「你好」的牌子", ["你好"]), ("it's a dog's life", []),
        ("the word 'open' on it's door", ["open"]), ("plain", []), ('a 24" monitor showing "HI"', ["HI"]),
        ("5'10\" man's \"T-shirt\"", ["T-shirt"]), ("a mug with ‘HELLO’ on it", ["HELLO"]), ("‘don’t’ and ‘go’", ["don’t", "go"]),
        ("„Guten Tag“ auf einem Schild", ["Guten Tag"]), ("«Bonjour» et »Hallo«", ["Bonjour", "Hallo"]),
        ("「猫」と『犬』", ["猫", "犬"]), ("the dogs' house, 'it's open'", ["it's open"]), ("6'2\" tall, 30\" wide", []),
        ("‘no end and a dog’s bone", []), ('say "a \'b\' c"', ["a 'b' c"]), ('size:"XL"', ["XL"]),
        ("a rock 'n' roll poster with 'Elvis'", ["Elvis"]), ("‚Hallo‘ und ‹Welt› ›da‹", ["Hallo", "Welt", "da"]),
    ],
)  # fmt: skip
def test_texts_are_what_stands_in_quotes(prompt, texts):
    assert ocr.texts_of(sample(prompt=prompt)) == texts


def test_texts_of_the_metadata_come_first(reader):
    given = sample(prompt='"no"', metadata={"texts": ["yes"]})
    assert ocr.texts_of(given) == ["yes"]
    with pytest.raises(UserError, match="give a list of texts"):
        reader([sample(metadata={"texts": "yes"})])


# faces


class Painted:
    """A reader of painted faces: every channel-0 value above 0 at the top left pixels is a person, with a width."""

    people = {n: np.eye(8, dtype=np.float32)[n] for n in range(8)}

    def faces(self, image):
        return [
            Face(float(w), self.people[p] if not mixed else self.mixed(p, mixed))
            for p, w, mixed in image[0].tolist()
            if w
        ]

    def mixed(self, person, amount):
        """cosine amount / 100 with the person."""
        vector = self.people[person] * amount / 100 + self.people[7] * np.sqrt(1 - (amount / 100) ** 2)
        return vector.astype(np.float32)


def crowd(*people, size=100):
    """people: (person, width, cosine in per cent or 0 for the very same)."""
    image = np.zeros((size, size, 3), np.uint8)
    image[0, : len(people)] = np.array(people).reshape(-1, 3)
    return image


def identity(output, *sources, **more):
    given = dict(detector="d", embedder="e", low=0.0, high=1.0) | more
    reward = FaceIdentity("f", options.FaceOptions(**given), Painted())
    return reward([sample(image=output, sources=sources)])[0].get("f")


def test_faces_are_matched_whatever_their_order():
    assert identity(crowd((2, 20, 0), (1, 20, 0)), crowd((1, 20, 0), (2, 20, 0))) == 1.0


def test_a_swapped_face_counts_by_its_cosine():
    assert identity(crowd((1, 20, 60), (2, 20, 0)), crowd((1, 20, 0), (2, 20, 0))) == pytest.approx(0.8)
    assert identity(crowd((1, 20, 60)), crowd((1, 20, 0)), low=0.2, high=0.7) == pytest.approx(0.8)


def test_the_table_of_missing_faces():
    source = crowd((1, 20, 0), (2, 60, 0))
    assert identity(source, crowd()) is None  # no face in the source
    assert identity(crowd(), source) == 0.0
    assert identity(crowd((2, 60, 0)), source) == 0.5
    assert identity(crowd((2, 60, 0)), source, weight="size") == 0.75
    assert identity(crowd((1, 20, 0), (2, 60, 0), (3, 20, 0)), source) == 1.0
    assert identity(crowd((1, 20, 0), (2, 60, 0), (3, 20, 0)), source, surplus=0.25) == 0.75


def test_small_faces_are_none():
    assert identity(crowd((1, 20, 0), (3, 1, 0)), crowd((1, 20, 0), (2, 1, 0))) == 1.0
    assert identity(crowd((1, 20, 0)), crowd((1, 1, 0))) is None


def test_several_sources_give_their_faces():
    assert identity(crowd((1, 20, 0), (2, 20, 0)), crowd((1, 20, 0)), crowd((2, 20, 0))) == 1.0


def test_a_calibration_fits_both_ends():
    assert faces.fit([0.6, 0.8, 0.7], [0.1, 0.0, 0.2]) == pytest.approx((0.1, 0.7))
    with pytest.raises(UserError, match="check the labels"):
        faces.fit([0.1], [0.5])


def test_missing_weights_are_told():
    with pytest.raises(UserError, match="the face detector /no/yunet.onnx does not exist"):
        FaceIdentity("f", options.FaceOptions(detector="/no/yunet.onnx", embedder="/no/sface.onnx"))


def test_weights_that_are_none_are_told(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="OpenCV cannot load"):
        FaceIdentity("f", options.FaceOptions(detector=str(tmp_path / "x.onnx"), embedder=str(tmp_path / "x.onnx")))


@pytest.mark.skipif(
    "QIRL_YUNET" not in os.environ, reason="QIRL_YUNET, QIRL_SFACE and QIRL_FACE name weights and a portrait"
)
def test_a_portrait_is_itself_end_to_end():
    portrait = np.asarray(Image.open(os.environ["QIRL_FACE"]).convert("RGB"))
    reward = FaceIdentity(
        "f", options.FaceOptions(detector=os.environ["QIRL_YUNET"], embedder=os.environ["QIRL_SFACE"])
    )
    kept, none = reward([sample(image=portrait, sources=(portrait,)), sample(image=portrait * 0, sources=(portrait,))])
    assert kept["f"] == 1.0 and none["f"] == 0.0


# config


@pytest.mark.parametrize("kind", ["artifacts", "diversity", "ocr"])
def test_a_kind_is_built_from_a_config(kind):
    config = load("serve", {"rewards": {"x": {"kind": kind}}})
    (reward,) = build(config.rewards)
    assert reward.components == ("x",) and len(reward([sample(prompt='"a"'), sample(1)])) == 2


@pytest.mark.parametrize(
    "given,message",
    [
        ({"kind": "clip_score"}, "needs `model`"), ({"kind": "aesthetic", "model": "m"}, "needs `head`"),
        ({"kind": "face_identity"}, "needs `detector` and `embedder`"),
        ({"kind": "face_identity", "backend": "insightface"}, "needs `pack`"),
        ({"kind": "diversity", "low": 1, "high": 1}, "are the same; they must differ"),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        load("serve", {"rewards": {"x": given}})

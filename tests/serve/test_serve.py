"""The server: answers as `FewShotClassifier` gives them, JSON within limits, and the page in a real browser."""

import base64
import io
import json
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lorarecycle import Backbone, FewShotClassifier, recycle
from lorarecycle.config import DISTANCES
from lorarecycle.meta.prototypes import distance_logits
from lorarecycle.serve.answers import OnnxModel, TorchModel, answer, logits_of, open_model
from lorarecycle.serve.request import Limits, TooLarge, read_request

pytestmark = pytest.mark.medium
NAME = "<i>kind & 0</i>"


@pytest.fixture
def photos(make_data):
    data = make_data(n_classes=3, per_class=4)
    pictures = [Image.fromarray(np.ascontiguousarray(i.permute(1, 2, 0).numpy())) for i in data.images]
    names = (NAME, "b", "c")
    return {name: pictures[4 * c : 4 * c + 3] for c, name in enumerate(names)}, pictures[3::4]


@pytest.fixture
def model(tiny_backbone, make_adapter):
    return TorchModel(tiny_backbone.merge(make_adapter(tiny_backbone, head=False)), "tiny <model>")


def encoded(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def request_of(photos) -> bytes:
    support, queries = photos
    return json.dumps(
        {"support": {n: list(map(encoded, i)) for n, i in support.items()}, "queries": list(map(encoded, queries))}
    ).encode()


def test_answers_are_those_of_the_classifier(tiny_backbone, make_adapter, photos, model):
    support, queries = photos
    classifier = FewShotClassifier(tiny_backbone, make_adapter(tiny_backbone, head=False))
    classifier.fit([i for images in support.values() for i in images], np.repeat(list(support), 3))
    found, milliseconds = answer(model, support, queries)
    assert [one.label for one in found] == list(classifier.predict(queries))
    for one, row in zip(found, classifier.predict_proba(queries), strict=True):
        given = [one.probabilities[name] for name in classifier.classes_]
        assert given == pytest.approx(row.tolist(), abs=1e-4)
        attention = np.array(one.attention)
        assert attention.shape == (4, 4)
        assert attention.max() == 1
        assert 0 <= one.nearest < 9
    assert min(milliseconds.values()) > 0


def test_the_same_from_an_export(tmp_path, tiny_backbone, make_adapter, photos, model):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from lorarecycle.export import export_onnx

    folder = export_onnx(tiny_backbone, tmp_path / "served", make_adapter(tiny_backbone, head=False)).folder
    opened = open_model(folder)
    assert isinstance(opened, OnnxModel)
    ours, theirs = answer(opened, *photos)[0], answer(model, *photos)[0]
    assert [one.label for one in ours] == [one.label for one in theirs]
    assert ours[0].attention is None
    assert ours[0].probabilities == pytest.approx(theirs[0].probabilities, abs=1e-3)


def test_an_adapter_and_a_folder_of_nothing(tmp_path, make_adapter):
    demo = Backbone.load("demo")
    folder = make_adapter(demo, head=False).save(tmp_path / "a")
    assert open_model(folder, base="demo", dtype="float32").name.startswith("demo with ")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="must be the work_dir of a run, an exported model or a PEFT adapter"):
        open_model(tmp_path / "none")


def test_a_run_is_served_with_its_own_base(tmp_path, make_adapter):
    """At its image size; another model under that name is refused."""
    demo = Backbone.load("demo", image_size=64)
    recycle([make_adapter(demo)], base=demo, work_dir=tmp_path / "run", meta={"steps": 0}, quiet=True)
    assert open_model(tmp_path / "run", dtype="float32").backbone.image_size == 64
    with pytest.raises(ValueError, match=r"`base` must be the model that the run was of \(demo\), got .* 32 pixels"):
        open_model(tmp_path / "run", image_size=32)
    other = Backbone.load("demo", mean=(0.1, 0.2, 0.3), resize="squash", crop_pct=0.9)
    recycle([make_adapter(other)], base=other, work_dir=tmp_path / "other", meta={"steps": 0}, quiet=True)
    assert open_model(tmp_path / "other").backbone.mean == (0.1, 0.2, 0.3)
    half = Backbone.load("demo", dtype=torch.bfloat16)
    recycle([make_adapter(half)], base=half, work_dir=tmp_path / "half", meta={"steps": 0}, quiet=True)
    assert open_model(tmp_path / "half").backbone.image_size == 32


def test_bad_questions(model, photos):
    support, queries = photos
    with pytest.raises(ValueError, match="must name a class and `queries` hold an image"):
        answer(model, support, [])
    with pytest.raises(ValueError, match="must hold an image of every class, got none of b"):
        answer(model, {**support, "b": []}, queries)


@pytest.mark.parametrize(
    ("body", "limits", "kind", "message"),
    [
        (b"{", Limits(), ValueError, "must be JSON"),
        (b"[1]", Limits(), ValueError, "got list without these"),
        (b'{"support": {"a": 1}, "queries": []}', Limits(), ValueError, "whose images are no list"),
        (
            b'{"support": {"a": ["!"]}, "queries": []}',
            Limits(),
            ValueError,
            "a, image 0 must be an image file in base64",
        ),
        (b'{"support": {"a": ["AAAA"]}, "queries": []}', Limits(), ValueError, "cannot be read"),
        (b'{"support": {"a": [7]}, "queries": []}', Limits(), ValueError, "cannot be read"),
        (b'{"support": {"a": ["", ""]}, "queries": []}', Limits(images=1), TooLarge, "at most 1 images"),
        (b'{"support": {"a": [], "b": []}, "queries": []}', Limits(classes=1), TooLarge, "of 1 classes"),
        (b'{"support": {}, "queries": []}', Limits(bytes=9), TooLarge, "at most 9 bytes"),
    ],
)
def test_requests_that_are_refused(body, limits, kind, message):
    with pytest.raises(kind, match=message):
        read_request(body, limits)


def test_an_image_of_too_many_pixels_is_not_decoded(photos):
    with pytest.raises(TooLarge, match="at most 100 pixels, got 32 x 32"):
        read_request(request_of(photos), Limits(pixels=100))


@pytest.fixture
def address(model):
    """A server of the model, while the test runs."""
    pytest.importorskip("gradio", reason="the page needs the extra `serve`")
    import uvicorn

    from lorarecycle.serve.app import build_app

    server = uvicorn.Server(
        uvicorn.Config(build_app(model, Limits(images=30, bytes=200_000)), port=0, log_level="warning")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < deadline, "the server never started"
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def test_post_predict(address, photos, model):
    import httpx

    assert httpx.get(f"{address}/health").json()["limits"]["images"] == 30
    reply = httpx.post(f"{address}/predict", content=request_of(photos), timeout=60)
    assert reply.status_code == 200
    found = reply.json()
    expected, _ = answer(model, *photos)
    assert [one["class"] for one in found["answers"]] == [one.label for one in expected]
    assert set(found["answers"][0]["probabilities"]) == set(photos[0])
    assert set(found["milliseconds"]) == {"learn", "answer"}
    assert httpx.post(f"{address}/predict", content=b"{").status_code == 400
    large = httpx.post(f"{address}/predict", content=b"x" * 200_001)
    assert large.status_code == 413
    assert "at most 200000 bytes" in large.json()["error"]


def test_the_page_in_a_browser(address, photos, model, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("browser tests need Chromium")
    support, queries = photos
    for c, images in enumerate([*support.values(), queries]):
        for i, image in enumerate(images):
            image.save(tmp_path / f"{c}-{i}.png")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        foreign, errors = [], []
        page.on("request", lambda r: foreign.append(r.url) if r.url.startswith("http") and address not in r.url else 0)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.get_by_role("button", name="Answer").click()
        page.get_by_text("Give photos of at least two classes").wait_for()
        files = page.locator("input[type=file]")
        for c, name in enumerate(support):
            page.get_by_label(f"Class {c + 1}", exact=True).fill(name)
        for c, place in enumerate((0, 1, 2, 4)):  # while it uploads, a place has no input: those after it move up
            files.nth(place).set_input_files([str(tmp_path / f"{c}-{i}.png") for i in range(3)])
            page.locator(".grid-container img").nth(3 * c + 2).wait_for()
            files.nth(4).wait_for(state="attached")
        page.get_by_role("button", name="Answer").click()
        page.locator(".answers article").nth(2).wait_for()
        expected, _ = answer(model, support, queries)
        assert page.locator(".answers h3").all_text_contents() == [one.label for one in expected]
        assert page.locator(".answers svg rect").count() == 3 * 16
        assert "ms for each answer" in page.content()
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert errors == []
        assert foreign == [], "nothing comes from the network"
        browser.close()


@pytest.mark.parametrize("distance", DISTANCES)
def test_an_export_keeps_its_distance(distance):
    g = torch.Generator().manual_seed(0)
    features, centres = 3 + torch.randn(20, 8, generator=g), 3 + torch.randn(4, 8, generator=g)
    expected = distance_logits(features, centres, distance).numpy()
    np.testing.assert_allclose(logits_of(features.numpy(), centres.numpy(), distance), expected, atol=1e-4)
    model = OnnxModel(SimpleNamespace(config={"distance": distance}), "served")
    assert model.distance == distance

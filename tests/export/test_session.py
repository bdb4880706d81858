"""FewShotSession: the same answers as FewShotClassifier, without torch."""

import io
import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from lorarecycle.export import FewShotSession, export_onnx, onnx_files, pixels, runtime
from PIL import Image

from lorarecycle import FewShotClassifier
from lorarecycle.data.images import normalize, to_uint8
from lorarecycle.fewshot import prototype_files
from lorarecycle.fewshot.labels import NotFittedError
from lorarecycle.runtime import settled
from lorarecycle.runtime.settled import TornFolderError

pytestmark = pytest.mark.medium


@pytest.fixture
def classifier(model):
    return FewShotClassifier(model.backbone, model.meta_lora)


@pytest.fixture
def session(exported):
    return FewShotSession(exported, threads=1)


def photo(width, height, mode="RGB", seed=0):
    """A smooth picture with some noise."""
    grid = np.mgrid[0:height, 0:width].astype(float)
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)) * 12
    waves = np.stack([np.sin(grid[0] / 7), np.cos(grid[1] / 9), np.sin((grid[0] + grid[1]) / 5)], axis=-1)
    return Image.fromarray((128 + 90 * waves + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def test_same_answers_as_the_classifier(session, classifier, pictures):
    support, query = pictures.images[::3], pictures.images[1::3]
    names = [pictures.class_names[c] for c in pictures.labels[::3]]
    truth = [pictures.class_names[c] for c in pictures.labels[1::3]]
    classifier.fit(support, names)
    assert session.fit(support, names) is session
    assert session.classes_.tolist() == classifier.classes_.tolist()
    np.testing.assert_allclose(session.prototypes_, classifier.prototypes_, atol=1e-5)
    np.testing.assert_allclose(session.transform(query), classifier.transform(query), atol=1e-5)
    np.testing.assert_allclose(session.decision_function(query), classifier.logits(query), atol=1e-4)
    np.testing.assert_allclose(session.predict_proba(query), classifier.predict_proba(query), atol=1e-4)
    assert session.predict(query).tolist() == classifier.predict(query).tolist()
    assert session.score(query, truth) == classifier.score(query, truth) > 0.8
    assert session.score(query, ["unseen"] * len(query)) == 0
    bfloat16 = (query / 255).bfloat16()
    np.testing.assert_allclose(session.transform(bfloat16), classifier.transform(bfloat16), atol=1e-5)


def test_images_of_any_kind_and_size(session, classifier, tmp_path):
    sizes = [(32, 32), (90, 41), (33, 70), (20, 25), (32, 57)]
    photos = [photo(*size, seed=i) for i, size in enumerate(sizes)]
    files = [tmp_path / f"{i}.png" for i in range(len(photos))]
    for picture, file in zip(photos, files, strict=True):
        picture.save(file)
    expected = classifier.fit(photos, range(5)).transform(photos)
    arrays = [np.asarray(picture) for picture in photos]
    tensors = [torch.from_numpy(a.copy()).permute(2, 0, 1) for a in arrays]
    contents = [file.read_bytes() for file in files]
    objects = [io.BytesIO(content) for content in contents]
    for images in (
        photos,
        files,
        [str(f) for f in files],
        contents,
        objects,
        iter(objects),
        arrays,
        tensors,
        iter(photos),
    ):
        ours = session.transform(images)
        cosine = (ours * expected).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosine.min() > 0.9999


@pytest.mark.parametrize("size", [(32, 32), (90, 41), (33, 70), (20, 25), (32, 57), (7, 300)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16", "F"])
def test_pixels_are_those_of_the_torch_path(size, mode):
    picture = photo(*size)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    elif mode == "F":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.float32) / 255)
    else:
        picture = picture.convert(mode)
    theirs = to_uint8(picture, 32).numpy()
    (ours,) = pixels.to_batches(picture, 32, 8)
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert ours.shape == theirs.shape
    assert difference.max() <= 1, "grey levels, of 255"
    assert (difference > 0).mean() < 0.3


def test_normalisation_is_that_of_the_torch_path():
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = normalize(levels, mean, std).numpy()
    np.testing.assert_array_equal(pixels.normalize(levels.numpy(), mean, std), expected)


def test_solve_is_one_graph_for_a_task(session, classifier, pictures):
    support, query = pictures.images[:40:4], pictures.images[1:40:4]
    labels = pictures.labels[:40:4]
    expected = classifier.fit(support, labels).logits(query)
    np.testing.assert_allclose(session.solve(support, labels, query), expected, atol=1e-4)
    for kind in (np.uint8, np.uint64, np.int16):
        np.testing.assert_allclose(session.solve(support, labels.numpy().astype(kind), query), expected, atol=1e-4)
    np.testing.assert_allclose(session.solve(support, iter(labels), query), expected, atol=1e-4)


GAPS = r"`support_labels` must hold every class from 0 .* got the classes \["


@pytest.mark.parametrize(
    ("n_images", "labels", "error", "message"),
    [
        pytest.param(3, [0, 2, 3], ValueError, GAPS, id="a class left out"),
        pytest.param(3, [0, 1, 10**12], ValueError, GAPS, id="a huge class"),
        pytest.param(3, [-1, 0, 1], ValueError, GAPS, id="a negative class"),
        pytest.param(3, [1, 1, 1], ValueError, GAPS, id="class 0 left out"),
        pytest.param(3, [0, 1], ValueError, "2 labels for 3 images", id="too few labels"),
        pytest.param(0, [], ValueError, "`support_images` must hold at least one image", id="no images"),
        pytest.param(1, 0, TypeError, "`support_labels` must be a sequence of labels, got 0", id="one number"),
        pytest.param(2, ["a", "b"], ValueError, "`support_labels` must be integers, got", id="strings"),
        pytest.param(2, [0.0, 1.0], ValueError, "`support_labels` must be integers, got", id="floats"),
        pytest.param(2, [False, True], ValueError, "`support_labels` must be integers, got", id="booleans"),
    ],
)
def test_solve_refuses_labels(session, pictures, n_images, labels, error, message):
    with pytest.raises(error, match=message):
        session.solve(pictures.images[:n_images] if n_images else [], labels, pictures.images[40:42])


def test_fixed_batch_uint8_int8(exported_int8, model, pictures):
    session = FewShotSession(exported_int8, batch_size=50)
    assert session.batch_size == 4
    classifier = FewShotClassifier(model.backbone, model.meta_lora, distance="cosine")
    labels = pictures.labels[::2]
    agree = session.fit(pictures.images[::2], labels).predict(pictures.images[1::2])
    expected = classifier.fit(pictures.images[::2], labels).predict(pictures.images[1::2])
    assert session.transform(pictures.images[:5]).shape == (5, 32)
    assert (agree == expected).mean() > 0.8
    assert session.solve(pictures.images[:11], pictures.labels[:11], pictures.images[20:29]).shape == (9, 2)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("labels", [["x", "y", "z"], [3, 1, 2], np.array([0.5, 1.5, 2.5], np.float32), ["x", 1, True]])
def test_prototypes_save_and_load(exported, pictures, tmp_path, suffix, labels):
    images = pictures.images[::20]
    fitted = FewShotSession(exported).fit(images, labels)
    path = fitted.save_prototypes(tmp_path / f"p{suffix}")
    served = FewShotSession(exported).load_prototypes(path)
    np.testing.assert_array_equal(served.prototypes_, fitted.prototypes_)
    assert served.classes_.dtype == fitted.classes_.dtype
    assert served.classes_.tolist() == fitted.classes_.tolist()
    assert served.predict(images).tolist() == fitted.predict(images).tolist()


@pytest.mark.parametrize(
    ("labels", "name", "error", "message"),
    [
        pytest.param(None, "p.npz", NotFittedError, "call `fit", id="not fitted"),
        pytest.param([(1, 2), (3, 4)], "p.npz", ValueError, "strings or numbers", id="labels of another kind"),
        pytest.param(["a", "b"], "p.pkl", ValueError, r"must end in \.npz or \.safetensors", id="another suffix"),
    ],
)
def test_prototypes_that_cannot_be_saved(exported, pictures, tmp_path, labels, name, error, message):
    session = FewShotSession(exported)
    if labels is not None:
        session.fit(pictures.images[:2], labels)
    with pytest.raises(error, match=message):
        session.save_prototypes(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_prototypes_of_another_model_and_damaged_ones(exported, exported_int8, pictures, tmp_path, monkeypatch, suffix):
    session = FewShotSession(exported).fit(pictures.images[:2], ["a", "b"])
    path = session.save_prototypes(tmp_path / f"p{suffix}")
    with pytest.raises(ValueError, match="must hold the centres of this model"):
        FewShotSession(exported_int8).load_prototypes(path)
    monkeypatch.setattr(prototype_files, "FORMAT_VERSION", 3)
    with pytest.raises(ValueError, match="`format_version` 2 in place of 3; save again"):
        session.load_prototypes(path)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="must be a whole file of `save_prototypes`"):
        session.load_prototypes(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no prototypes"):
        session.load_prototypes(path)


@pytest.mark.slow
def test_prototypes_of_other_weights_beside_the_graph(model, pictures, tmp_path, monkeypatch):
    """The graph is the same, the weights in the file beside it are not."""
    monkeypatch.setattr(onnx_files, "MAX_INLINE_BYTES", 1000)
    plain, merged = (
        export_onnx(model.backbone, tmp_path / name, adapter).folder
        for name, adapter in (("plain", None), ("merged", model.meta_lora))
    )
    assert (plain / "encoder.onnx").read_bytes() == (merged / "encoder.onnx").read_bytes()
    path = FewShotSession(plain).fit(pictures.images[:2], ["a", "b"]).save_prototypes(tmp_path / "p.npz")
    assert FewShotSession(plain).load_prototypes(path).predict(pictures.images[:2]).tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="must hold the centres of this model"):
        FewShotSession(merged).load_prototypes(path)


def test_prototypes_of_images_prepared_otherwise(exported, pictures, tmp_path):
    path = FewShotSession(exported).fit(pictures.images[:2], ["a", "b"]).save_prototypes(tmp_path / "p.npz")
    folder = shutil.copytree(exported, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match="must hold the centres of this model"):
        FewShotSession(folder).load_prototypes(path)


def with_nan(images):
    broken = images.float() / 255
    broken[1, 0, 0, 0] = float("nan")
    return broken


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(lambda s, x: s.predict(x), NotFittedError, "call `fit", id="not fitted"),
        pytest.param(lambda s, x: s.fit(x, [0, 1]), ValueError, "got 2 labels for 3 images", id="too few labels"),
        pytest.param(
            lambda s, x: s.fit([], []), ValueError, "`support_images` must hold at least one image", id="no images"
        ),
        pytest.param(
            lambda s, x: s.fit(with_nan(x), [0, 1, 2]),
            ValueError,
            "`support_images` must be finite, got 1 NaN",
            id="a NaN",
        ),
        pytest.param(
            lambda s, x: s.transform(with_nan(x).nan_to_num() * 255), ValueError, "must hold floats in", id="0 to 255"
        ),
        pytest.param(
            lambda s, x: s.transform([{"a": 1}]), TypeError, r"`images\[0\]` must be a PIL image", id="a dict"
        ),
        pytest.param(lambda s, x: s.transform("nowhere.png"), FileNotFoundError, "no image file", id="no file"),
    ],
)
def test_bad_input(session, pictures, call, error, message):
    with pytest.raises(error, match=message):
        call(session, pictures.images[:3])


def test_a_file_that_is_no_image(session, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ValueError, match=r"bad\.png must be readable"):
        session.transform(tmp_path / "bad.png")


def test_prepared_pixels_are_arrays_or_tensors(session):
    good = np.zeros((2, 3, 32, 32), np.float32)
    assert session.embed(good).shape == (2, 32)
    assert session.embed(torch.from_numpy(good)).shape == (2, 32)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([[1.0]], id="a list"),
        pytest.param(np.zeros((2, 3, 16, 32), np.float32), id="another size"),
        pytest.param(np.zeros((2, 3, 32, 32), np.float64), id="float64"),
        pytest.param(np.zeros((2, 3, 32, 32), np.uint8), id="uint8"),
        pytest.param(np.zeros((3, 32, 32), np.float32), id="no batch"),
    ],
)
def test_prepared_pixels_of_another_size_or_dtype(session, bad):
    with pytest.raises(ValueError, match=r"`pixel_values` must be float32 \['batch_size', 3, 32, 32\], got"):
        session.embed(bad)


def test_prepared_pixels_that_are_not_finite(session):
    pixels = np.zeros((2, 3, 32, 32), np.float32)
    pixels[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="`pixel_values` must be finite, got 1 NaN"):
        session.embed(pixels)


@pytest.mark.parametrize("name", ["encoder.onnx", "head.onnx"])
def test_damaged_files(exported, tmp_path, name):
    folder = shutil.copytree(exported, tmp_path / "copy")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{name} must be the file that config\.json describes"):
        FewShotSession(folder)
    with pytest.raises(ValueError, match=rf"{name} must be a whole ONNX file"):
        FewShotSession(folder, verify=False)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no file .*{name}"):
        FewShotSession(folder)


def test_another_graph_in_the_place_of_the_encoder(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    shutil.copy(folder / "head.onnx", folder / "encoder.onnx")
    session = FewShotSession(folder, verify=False)
    with pytest.raises(ValueError, match=r"encoder\.onnx must have an input `pixel_values`, got \['embeddings'"):
        session.fit(np.zeros((1, 32, 32, 3), np.uint8), [0])


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("image_size", "32", "a size in pixels"),
        ("image_size", 0, "a size in pixels"),
        ("mean", [0.5], "three numbers"),
        ("std", [0.5, 0.5, 0], "three numbers above 0"),
        ("input_dtype", "int4", "'float32' or 'uint8'"),
        ("batch_size", None, "'dynamic' or a number of images"),
        ("embed_dim", "wide", "a width"),
        ("sha256", [], "hashes by file name"),
    ],
)
def test_a_damaged_description(exported, tmp_path, key, value, rule):
    folder = shutil.copytree(exported, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=rf"`{key}` in .*config\.json must be {rule}, got .*; export again"):
        FewShotSession(folder)


def test_folders_that_are_no_export(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder written by"):
        FewShotSession(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="got none of image_size"):
        FewShotSession(tmp_path)
    text = (exported / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ValueError, match="`format_version` .* must be at most 1, got 9"):
        FewShotSession(tmp_path)
    (tmp_path / "config.json").write_text(text.replace('"format_version": 1', '"format_version": "1"'))
    with pytest.raises(ValueError, match="`format_version` .* must be at most 1, got '1'"):
        FewShotSession(tmp_path)


def test_providers_and_threads(exported, monkeypatch):
    with pytest.raises(ValueError, match=r"`providers` must be some of .* `lorarecycle\[onnx-gpu\]`"):
        FewShotSession(exported, providers=["NoSuchProvider"])
    with pytest.raises(ValueError, match="`threads` must be at least 1"):
        FewShotSession(exported, threads=0)
    for value, expected in (("3", 3), ("4,2", 4), ("many", 0), ("", 0)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        session = runtime.Graph(exported / "encoder.onnx", providers=["CPUExecutionProvider"]).session
        assert session.get_session_options().intra_op_num_threads == expected
    ort = runtime.import_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*reversed(runtime.PROVIDERS), "Other"])
    loaded = []
    monkeypatch.setattr(ort, "preload_dlls", lambda: loaded.append("CUDA"))
    assert runtime._choose(ort, ["CPUExecutionProvider"]) == ["CPUExecutionProvider"]
    assert not loaded
    assert runtime._choose(ort, None) == list(runtime.PROVIDERS)
    assert loaded == ["CUDA"]


def test_a_gpu_is_used_without_tf32_and_not_left_unnoticed(exported, monkeypatch):
    class OnCPU:
        def __init__(self, path, options, providers):
            self.asked = providers

        def get_providers(self):
            return ["CPUExecutionProvider"]

        def get_inputs(self):
            return []

        get_outputs = get_inputs

    ort = runtime.import_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(runtime.PROVIDERS))
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", OnCPU)
    path = exported / "head.onnx"
    cuda, *others = runtime.Graph(path).session.asked
    assert cuda == ("CUDAExecutionProvider", {"use_tf32": "0"})
    assert others == ["TensorrtExecutionProvider", "CPUExecutionProvider"]
    assert runtime.Graph(path, providers=["CPUExecutionProvider"]).session.asked == ["CPUExecutionProvider"]
    with pytest.raises(ValueError, match="got CUDAExecutionProvider, in whose place CPUExecutionProvider would run"):
        FewShotSession(exported, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_without_onnxruntime_the_extra_is_named(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"install `lorarecycle\[onnx\]` .* `lorarecycle\[onnx-gpu\]`"):
        FewShotSession(exported)


def test_a_broken_onnxruntime_is_a_missing_one(exported, monkeypatch):
    """Removing one of the two packages leaves a folder without files, which Python imports."""
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    with pytest.raises(ImportError, match=r"folder is there without its files\); install `lorarecycle\[onnx\]`"):
        FewShotSession(exported)


def test_without_pillow_and_safetensors(session, pictures, tmp_path, monkeypatch):
    session.fit(pictures.images[:2], ["a", "b"])
    kept = session.save_prototypes(tmp_path / "p.safetensors")
    for name in ("PIL", "safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "query.png").touch()
    for needs_pillow in (tmp_path / "query.png", np.zeros((40, 50, 3), np.uint8)):
        with pytest.raises(ImportError, match="need Pillow .* install `pillow`, or pass arrays of the model's size"):
            session.predict(needs_pillow)
    for use in (session.load_prototypes, session.save_prototypes):
        with pytest.raises(ImportError, match=r"need safetensors .* install `safetensors`, or use a \.npz file"):
            use(kept)
    assert session.load_prototypes(session.save_prototypes(tmp_path / "p.npz")).classes_.tolist() == ["a", "b"]


def test_it_runs_where_torch_cannot_be_imported(exported, pictures, tmp_path):
    images = pictures.images[::10].permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "images.npy", images)
    Image.fromarray(images[0]).resize((50, 40)).save(tmp_path / "query.jpg")
    code = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'timm', 'safetensors', 'sklearn', 'tqdm', 'tyro'):\n"
        "    sys.modules[name] = None\n"
        "import numpy as np\n"
        "from lorarecycle.export import FewShotSession\n"
        f"session = FewShotSession({str(exported)!r})\n"
        f"images = np.load({str(tmp_path / 'images.npy')!r})\n"
        "assert 'PIL' not in sys.modules\n"
        "session.fit(images, list('abcdef'))\n"
        "assert 'PIL' not in sys.modules, 'images of the right size need no Pillow'\n"
        "assert session.predict(images).tolist() == list('abcdef')\n"
        f"path = session.save_prototypes({str(tmp_path / 'p.npz')!r})\n"
        f"again = FewShotSession({str(exported)!r}).load_prototypes(path)\n"
        f"assert again.predict({str(tmp_path / 'query.jpg')!r}).shape == (1,)\n"
        "assert again.score(images, list('abcdef')) == 1\n"
        "assert session.solve(images, range(6), images).argmax(1).tolist() == [0, 1, 2, 3, 4, 5]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_session_can_be_pickled(exported, pictures):
    session = FewShotSession(exported, threads=1).fit(pictures.images[::3].numpy(), pictures.labels[::3].tolist())
    query, expected = pictures.images[1::3].numpy(), session.predict(pictures.images[1::3])
    again = pickle.loads(pickle.dumps(session))
    assert again.predict(query).tolist() == expected.tolist()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(session.predict, (query,)).tolist() == expected.tolist()


def test_an_export_that_is_replaced_while_it_is_opened(exported, tmp_path, monkeypatch):
    """The second look finds the new files together; files that stay mixed are refused."""
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    config = (folder / "config.json").read_text()
    torn = json.loads(config)
    torn["sha256"]["head.onnx"] = "0"
    (folder / "config.json").write_text(json.dumps(torn))
    waited = []

    def arrive(seconds):
        waited.append(seconds)
        (folder / "config.json").write_text(config)

    monkeypatch.setattr(settled.time, "sleep", arrive)
    FewShotSession(folder, threads=1)
    assert len(waited) == 1
    monkeypatch.setattr(settled.time, "sleep", waited.append)
    (folder / "config.json").write_text(json.dumps(torn))
    with pytest.raises(TornFolderError, match=r"head\.onnx must be the file that config\.json describes"):
        FewShotSession(folder, threads=1)


def test_many_classes_a_part_of_them_at_a_time(exported, pictures, monkeypatch):
    images, labels = pictures.images.numpy(), list(range(60))
    session = FewShotSession(exported).fit(images, labels)
    whole, shares, found = (f(images) for f in (session.decision_function, session.predict_proba, session.predict))
    monkeypatch.setattr("lorarecycle.export.session.DIFFERENCES", 8 * 32 * 7)  # seven classes
    np.testing.assert_allclose(session.decision_function(images), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(session.predict_proba(images), shares, rtol=1e-4, atol=1e-6)
    assert list(session.predict(images)) == list(found) == labels

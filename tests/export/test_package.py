"""The package compiled ahead of time, and the C++ runner that answers from it without Python."""

import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from lorarecycle.export import ExportConfig, export_aoti
from PIL import Image

from lorarecycle import Backbone, FewShotClassifier

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler on this machine"
)

pytestmark = pytest.mark.slow  # the C++ runner is built


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("aoti") / "encoder.pt2"
    assert export_aoti(model.backbone, path, model.meta_lora).max_error < 1e-4
    return path


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """lorarecycle-predict, built from the checkout."""
    if shutil.which("cmake") is None:
        pytest.skip("no CMake on this machine")
    build = tmp_path_factory.mktemp("runner")
    source = ["-S", str(ROOT / "csrc" / "runner"), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
    configured = subprocess.run(["cmake", *source], capture_output=True, text=True, check=False)
    if configured.returncode and (
        "Could NOT find JPEG" in configured.stderr or "Could NOT find PNG" in configured.stderr
    ):
        pytest.skip("libjpeg or libpng headers absent")
    assert configured.returncode == 0, configured.stderr
    built = subprocess.run(["cmake", "--build", str(build)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return build / "lorarecycle-predict"


@pytest.fixture(scope="module")
def photos(pictures, tmp_path_factory):
    """A support folder and query files of every kind that the runner reads."""
    folder = tmp_path_factory.mktemp("photos")
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pictures.images]
    for i in range(0, 60, 5):
        target = folder / "support" / pictures.class_names[pictures.labels[i]]
        target.mkdir(parents=True, exist_ok=True)
        images[i].resize((57, 40)).save(target / f"{i}.{'png' if i % 2 else 'jpg'}", quality=92)
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = images[31].quantize(32)
    grey16 = Image.fromarray(np.asarray(images[41].convert("L")).astype(np.uint16) * 257)
    queries = {
        "plain.png": (images[1], {}),
        "small.jpg": (images[11].resize((20, 31)), {"quality": 90}),
        "turned.jpeg": (images[21].resize((64, 48)), {"exif": turned.tobytes(), "quality": 95}),
        "palette.png": (palette, {"transparency": 3}),
        "grey.jpg": (images[41].convert("L"), {}),
        "grey16.png": (grey16, {}),
        "alpha.png": (images[51].convert("RGBA"), {}),
        "turned.png": (images[21].resize((64, 48)), {"exif": turned.tobytes()}),
        "more.jpg": (images[1], {"quality": 95}),
    }
    for name, (image, options) in queries.items():
        image.save(folder / name, **options)
    whole = (folder / "more.jpg").read_bytes()
    (folder / "more.jpg").write_bytes(whole[:-2] + b"more" + whole[-2:])  # of which libjpeg warns
    return folder, [folder / name for name in queries]


def chunk(kind, content):
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def predict(runner, *words, cwd=None):
    return subprocess.run([str(runner), *map(str, words)], capture_output=True, text=True, check=False, cwd=cwd)


@needs_compiler
def test_the_runner_answers_as_python_does(package, runner, model, photos):
    folder, queries = photos
    done = predict(runner, package, "--support", folder / "support", "--query", *queries)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [str(query) for query in queries]
    support = sorted((folder / "support").glob("*/*"))
    classifier = FewShotClassifier(model.backbone, model.meta_lora).fit(support, [file.parent.name for file in support])
    for query, (_, label, probability) in zip(queries, rows, strict=True):
        (expected,) = classifier.predict_proba(query)
        assert label == classifier.classes_[expected.argmax()], query.name
        assert abs(float(probability) - expected.max()) < 2e-3, query.name


@needs_compiler
def test_the_runner_prepares_images_as_the_base_does(runner, model, photos, tmp_path):
    """The package says how; hidden files and folders are no input, sub-folders of a class are."""
    plain = model.backbone
    base = Backbone(plain.vit, name="tiny", mean=plain.mean, std=plain.std, resize="squash", crop_pct=0.9)
    export_aoti(base, tmp_path / "encoder.pt2", model.meta_lora)
    shutil.copytree(photos[0] / "support", tmp_path / "support")
    first = min((tmp_path / "support").glob("*/*.jpg"))
    (first.parent / "more").mkdir()
    first.rename(first.parent / "more" / "0.JFIF")
    shutil.copy(photos[0] / "alpha.png", tmp_path)
    for name, target in (("loop", tmp_path / "support"), ("up", tmp_path)):
        (first.parent / name).symlink_to(target, target_is_directory=True)
    for hidden in ("a/._0.png", ".hidden/0.png", "__MACOSX/a/._0.jpg", "@eaDir/0.png", "Lost+Found/0.png"):
        (tmp_path / "support" / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "support" / hidden).write_bytes(b"\0\5\x16\7Mac OS X")
    query = photos[0] / "turned.jpeg"
    done = predict(runner, tmp_path / "encoder.pt2", "--support", tmp_path / "support", "--query", query)
    assert done.returncode == 0, done.stderr
    _, label, probability = done.stdout.strip().split("\t")
    support = sorted((photos[0] / "support").glob("*/*"))
    classifier = FewShotClassifier(base, model.meta_lora).fit(support, [file.parent.name for file in support])
    (expected,) = classifier.predict_proba(query)
    assert label == classifier.classes_[expected.argmax()]
    assert abs(float(probability) - expected.max()) < 2e-3


@pytest.fixture(scope="module")
def bad_files(package, photos, tmp_path_factory):
    """A folder of what the runner must refuse, beside links to a whole package and to support images."""
    root = tmp_path_factory.mktemp("bad")
    folder, queries = photos
    (root / "whole.pt2").symlink_to(package)
    (root / "support").symlink_to(folder / "support")
    (root / "damaged.jpg").write_bytes(queries[1].read_bytes()[:400])
    (root / "text.png").write_text("no image")
    header = struct.pack(">2I5B", 100_000, 100_000, 8, 2, 0, 0, 0)
    vast = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    (root / "vast.png").write_bytes(vast)
    (root / "other" / "class").mkdir(parents=True)
    (root / "other" / "class" / "picture.webp").write_bytes(b"RIFF")
    (root / "empty" / "class").mkdir(parents=True)
    (root / "foreign.pt2").write_text("no package")
    (root / "short.pt2").write_bytes(package.read_bytes()[:-100])
    return root


@needs_compiler
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("whole.pt2 --support support", "usage: lorarecycle-predict"),
        ("whole.pt2 --suport support", "unknown flag --suport"),
        ("no.pt2 --support support --query text.png", "no package"),
        ("foreign.pt2 --support support --query text.png", "foreign.pt2 must be a whole package for this machine"),
        ("short.pt2 --support support --query text.png", "short.pt2 must be a whole package for this machine"),
        ("whole.pt2 --support no --query text.png", "no support folder"),
        ("whole.pt2 --support empty --query text.png", "must hold PNG or JPEG files, got none"),
        ("whole.pt2 --support support --query text.png", "got neither PNG nor JPEG"),
        ("whole.pt2 --support support --query damaged.jpg", "damaged.jpg must be readable"),
        ("whole.pt2 --support support --query vast.png", "got 100000 x 100000 pixels, more than"),
        ("whole.pt2 --support other --query text.png", "picture.webp must be PNG or JPEG, got .webp"),
        ("whole.pt2 --support support --query no.png", "no image file"),
    ],
)
def test_the_runner_explains_bad_input(runner, bad_files, words, message):
    done = predict(runner, *words.split(), cwd=bad_files)
    assert done.returncode == 2
    assert done.stderr.startswith("lorarecycle-predict: error: ")
    assert message in done.stderr
    assert done.stdout == ""


@needs_compiler
def test_the_package_in_python(package, model, pictures):
    encoder = torch._inductor.aoti_load_package(str(package))
    expected = FewShotClassifier(model.backbone, model.meta_lora).fit_transform(pictures.images[:5], range(5))
    np.testing.assert_allclose(encoder(pictures.images[:5]).numpy(), expected, atol=1e-4)


def test_bad_settings(model, tmp_path):
    with pytest.raises(ValueError, match=r"`path` of a package must end in \.pt2"):
        export_aoti(model.backbone, tmp_path / "encoder.so")
    with pytest.raises(ValueError, match="`dtype` of a package must be 'fp32', got 'fp16'"):
        export_aoti(model.backbone, tmp_path / "encoder.pt2", config=ExportConfig(dtype="fp16"))
    assert not list(tmp_path.iterdir())

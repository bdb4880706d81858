"""`python -m lorarecycle.export`: the folder it writes, and one line for bad input."""

import subprocess
import sys

import pytest
from lorarecycle.export import package
from lorarecycle.export.__main__ import main
from lorarecycle.export.config import parse_batch_size, parse_prune

pytestmark = pytest.mark.medium


@pytest.mark.slow
def test_bare_command_exports_the_demo_model(tmp_path):
    command = [sys.executable, "-m", "lorarecycle.export", "--onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "demo-export"
    assert lines[0].startswith("encoder.onnx: max error ")
    assert {f.name for f in (tmp_path / "demo-export").iterdir()} == {
        "encoder.onnx",
        "head.onnx",
        "episode.onnx",
        "config.json",
    }
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "`directory` must be empty" in again.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "the format must be named, got none; pass `--onnx`"),
        (["--onnx", "--meta-lora", "nowhere"], "nowhere"),
        (["--onnx", "--model", "no_such_vit"], "`base` must be a timm model name"),
        (["--onnx", "--opset", "9"], "`opset` must be at least 18"),
        (["--onnx", "--img-size", "30"], "`img_size` must be a multiple of the patch size 4, got 30"),
        (["--onnx", "--batch-size", "many"], "`batch_size` must be 'dynamic' or a number"),
        (["--onnx", "--prune", "2-0.5"], "`prune` must be pairs such as 6:0.5"),
        (["--onnx", "--prune", "9:0.5"], "`prune` must name layers 0 to 5, got 9"),
        (["--onnx", "--images", "nowhere.png"], "no image file nowhere.png"),
        (["--onnx", "--weights", "mine.safetensors"], "`weights` must come with a `base` that names an architecture"),
        (
            ["--onnx", "--data", "photos"],
            "`--data` must come with `--onnx` and `--dtype` fp16 or int8, got",
        ),
        (["--onnx", "--dtype", "int8", "--split", "val"], "`--split` must come with `--data`, got 'val' alone"),
        (["--aoti", "--device", "cuda"], "`--device` must be cpu without `--onnx`, got cuda"),
        (["--aoti", "--dtype", "int8"], "`dtype` of a package must be 'fp32'"),
        (["--onnx", "--aoti", "--dtype", "fp16"], "`dtype` of a package must be 'fp32'"),
    ],
)
def test_bad_input_ends_with_one_line(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("lorarecycle.export: error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_ends_with_one_line(capsys, tmp_path, monkeypatch):
    def fail(*args, **keywords):
        raise RuntimeError("no working C++ compiler\nfound in g++")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package, "export_aoti", fail)
    assert main(["--aoti"]) == 2
    assert capsys.readouterr().err == "lorarecycle.export: error: no working C++ compiler found in g++\n"


def test_flags_in_words():
    assert parse_batch_size("dynamic") is None
    assert parse_batch_size("16") == 16
    assert parse_prune(("6:0.5", "9:0.25")) == {6: 0.5, 9: 0.25}
    with pytest.raises(ValueError, match="name a layer once"):
        parse_prune(("6:0.5", "6:0.25"))


def test_a_place_that_cannot_be_written_to(tmp_path, capsys):
    """Before a model is loaded."""
    (tmp_path / "file").write_text("mine")
    assert main([str(tmp_path / "file" / "out"), "--onnx", "--model", "nowhere"]) == 2
    assert "`directory` must be a place that can be written to, got" in capsys.readouterr().err

"""The commands: tune with checkpoints, task vectors, fit, sample."""

import re
import shutil

import pytest
import torch
from PIL import Image

from lorarecycle import Adapter, load_dataset
from lorarecycle.cli.generate import find_adapters, find_tasks
from lorarecycle.cli.main import main
from lorarecycle.generate import load_generator, load_vector

pytestmark = pytest.mark.medium

MACHINE = ["--device", "cpu", "--dtype", "float32", "--quiet"]
FIT = ["--epochs", "2", "--batch-size", "2", "--conv-layers", "6", "--latent", "8"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two task folders, made by the commands."""
    folder = tmp_path_factory.mktemp("work")
    data = folder / "digits"
    digits = load_dataset("digits", size=32)
    for name in digits.class_names[:4]:
        (data / name).mkdir(parents=True)
        for i, image in enumerate(digits.select_classes([name]).images[:5]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(data / name / f"{i}.png")
    for classes in (["0", "1"], ["2", "3"]):
        task = folder / "tasks" / "".join(classes)
        common = [str(data), "--base", "demo", "--classes", *classes, *MACHINE]
        assert main(["tune", *common, "--output", str(task), "--epochs", "3", "--save-last", "2"]) == 0
        vector = task / "task_vector.safetensors"
        assert main(["task-vector", "--data", *common, "--output", str(vector)]) == 0
    return folder / "tasks"


def test_tune_fit_and_sample(tasks, tmp_path, capsys):
    checkpoints = sorted((tasks / "01" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["epoch-0002", "epoch-0003"]
    assert Adapter.load(checkpoints[-1]).digest() == Adapter.load(tasks / "01").digest()
    output = tmp_path / "generator.safetensors"
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint.safetensors")]
    assert main(["generate", "fit", str(tasks), "--output", str(output), *checkpoint, *FIT, *MACHINE]) == 0
    assert (tmp_path / "checkpoint.safetensors").exists()
    capsys.readouterr()
    vector = tasks / "23" / "task_vector.safetensors"
    request = ["--task-vector", str(vector), "--output", str(tmp_path / "made"), "--n", "2", "--seed", "4"]
    assert main(["generate", "sample", str(output), *request]) == 0
    folders = capsys.readouterr().out.split()
    expected = load_generator(output).sample(load_vector(vector), 2, seed=4)
    assert [Adapter.load(folder).digest() for folder in folders] == [adapter.digest() for adapter in expected]
    assert expected[0].head.class_names == ("2", "3")


def test_folders_that_are_being_written_are_no_tasks(tasks, tmp_path):
    shutil.copytree(tasks, tmp_path / "tasks")
    hidden = tmp_path / "tasks" / ".partly-written-host-1-abc"
    for name in (hidden.name, ".23.saving-x", ".Trash-1000"):
        shutil.copytree(tasks / "01", tmp_path / "tasks" / name)
    found = find_tasks([tmp_path / "tasks"])
    assert [folder.name for folder in found] == ["01", "23"]
    assert find_tasks([tmp_path / "tasks"], vectors=2) == found
    shutil.copytree(tasks / "01" / "checkpoints" / "epoch-0002", found[0] / "checkpoints" / hidden.name)
    assert [folder.name for folder in find_adapters(found[0])] == ["epoch-0002", "epoch-0003"]


def test_tasks_and_vectors_by_name(tasks, tmp_path):
    vectors = [str(tasks / name / "task_vector.safetensors") for name in ("23", "01")]
    output = str(tmp_path / "g.safetensors")
    named = ["generate", "fit", str(tasks / "01"), str(tasks / "23"), "--output", output, *FIT, *MACHINE]
    assert main([*named, "--task-vectors", *vectors]) == 0
    names = load_generator(output).class_names  # the vectors are swapped
    generator = load_generator(output)
    assert names[generator.nearest(load_vector(vectors[0]))] == ("0", "1")


def test_one_folder_and_vectors_by_name(tasks, tmp_path, capsys):
    vectors = [str(tasks / name / "task_vector.safetensors") for name in ("01", "23")]
    output = str(tmp_path / "g.safetensors")

    def fit(folder, *vectors):
        return main(["generate", "fit", str(folder), "--output", output, *FIT, *MACHINE, "--task-vectors", *vectors])

    bare = tmp_path / "bare"
    shutil.copytree(tasks, bare, ignore=shutil.ignore_patterns("task_vector.safetensors"))
    (bare / "notes.txt").write_text("no task")
    assert fit(bare, *vectors) == 0
    generator = load_generator(output)
    assert generator.class_names[generator.nearest(load_vector(vectors[1]))] == ("2", "3")
    for one in (bare / "01", bare / "01" / "checkpoints"):
        assert fit(one, vectors[0]) == 0
        assert load_generator(output).class_names == (("0", "1"),)
    for given in (vectors[:1], [*vectors, vectors[0]]):
        assert fit(bare, *given) == 2
        assert f"one for each of the 2 tasks, got {len(given)}" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert fit(empty, vectors[0]) == 2
    assert "must be folders of PEFT adapters" in capsys.readouterr().err


def test_no_task_is_left_out_silently(tasks, tmp_path, capsys):
    folder = tmp_path / "tasks"
    shutil.copytree(tasks, folder)
    (folder / "23" / "task_vector.safetensors").unlink()
    assert main(["generate", "fit", str(folder), *FIT, *MACHINE]) == 2
    assert f"got adapters without it in {folder / '23'}; write it with" in capsys.readouterr().err


def test_a_fit_that_diverges_ends_with_one_line(tasks, tmp_path, capsys):
    output = ["--output", str(tmp_path / "g.safetensors")]
    assert main(["generate", "fit", str(tasks), *output, *FIT, *MACHINE, "--lr", "1e30"]) == 2
    assert re.fullmatch(r"lorarecycle: error: the loss of .*; lower `lr`\.\n", capsys.readouterr().err)


def test_a_text_vector(tmp_path, monkeypatch):
    seen = []

    def clip_encoder(model):
        seen.append(model)
        return lambda texts: torch.tensor([[len(text), 1.0] for text in texts])

    monkeypatch.setattr("lorarecycle.generate.task_vectors.clip_encoder", clip_encoder)
    output = str(tmp_path / "v.safetensors")
    assert main(["task-vector", "--text", "cats", "--clip", "some/clip", "--output", output]) == 0
    assert load_vector(output).tolist() == [4, 1]
    assert seen == ["some/clip"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["task-vector", "--output", "v"], "`--data` or `--text` must be given"),
        (["task-vector", "--text", "cats", "--output", "v"], "`--clip` must name the model"),
        (["generate", "fit", "nowhere"], "no such folder"),
        (["generate", "fit", "{empty}"], "must hold folders with task_vector.safetensors"),
        (["generate", "fit", "{empty}", "{empty}", "--task-vectors", "one"], "one for each of the 2 tasks, got 1"),
        (["generate", "fit", "{empty}", "{empty}"], "must be folders of PEFT adapters"),
        (["generate", "sample", "nowhere", "--task-vector", "v", "--output", "o"], "no file nowhere"),
        (["generate", "fit", "{empty}", "--batch-size", "1"], "`batch_size` must be at least 2"),
        (["tune", "digits", "--base", "demo", "--output", "x", "--epochs", "2", "--save-last", "3"], "`save_last`"),
    ],
)
def test_bad_input_ends_with_one_line(command, message, capsys, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([part.format(empty=empty) for part in command]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lorarecycle: error: ")
    assert message in error

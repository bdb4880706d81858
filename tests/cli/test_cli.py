"""The command line, on the model and the digits that come along."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lorarecycle import Adapter, RecycleConfig, load_dataset, tuning
from lorarecycle.cli.main import main
from lorarecycle.cli.renamed import current_flags

pytestmark = pytest.mark.medium

QUICK = ["--epochs", "1", "--device", "cpu", "--dtype", "float32", "--quiet"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder with two adapters, tuned by the command."""
    folder = tmp_path_factory.mktemp("adapters")
    data = folder.parent / f"{folder.name}-digits"
    digits = load_dataset("digits", size=32)
    for name in digits.class_names[:4]:
        (data / name).mkdir(parents=True)
        for i, image in enumerate(digits.select_classes([name]).images[:8]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(data / name / f"{i}.png")
    for classes in (["0", "1"], ["2", "3"]):
        output = str(folder / "".join(classes))
        assert main(["tune", str(data), "--base", "demo", "--output", output, "--classes", *classes, *QUICK]) == 0
    return folder, data


@pytest.mark.parametrize("flags", [["--preset", "paper"], ["--preset=paper"], []])
def test_presets_fill_in_what_is_not_given(monkeypatch, flags):
    seen = {}
    monkeypatch.setattr(
        "lorarecycle.cli.recycle.Recycle.run", lambda self: seen.update(config=self.config, preset=self.preset)
    )
    assert main(["recycle", "somewhere", *flags, "--meta.n-shot", "5"]) == 0
    preset = RecycleConfig.preset("paper" if flags else "default")
    assert seen["config"] == replace(preset, meta=replace(preset.meta, n_shot=5))
    assert seen["preset"] == ("paper" if flags else "default")


def test_tune_recycle_evaluate_predict(adapters, tmp_path, capsys):
    folder, data = adapters
    assert Adapter.load(folder / "01").head.class_names == ("0", "1")
    output = tmp_path / "meta"
    settings = ["--inversion.steps", "2", "--inversion.images-per-class", "4", "--inversion.prior", "None"]
    settings += ["--inversion.prune", "3", "0.5", "--meta.steps", "2", "--meta.n-way", "2", "--meta.n-query", "3"]
    common = ["--quiet", "--device", "cpu", "--dtype", "float32"]
    command = [
        "recycle",
        str(folder),
        "--output",
        str(output),
        "--work-dir",
        str(tmp_path / "work"),
        *settings,
        *common,
    ]
    assert main([*command, "--seed", "7"]) == 0
    meta_lora = Adapter.load(output)
    assert meta_lora.head is None
    assert '"seed": 7' in (output / "README.md").read_text()
    capsys.readouterr()

    worn = ["--meta-lora", str(output)]
    tasks = ["--n-way", "3", "--n-query", "2", "--n-tasks", "5"]
    assert main(["evaluate", str(data), *worn, *tasks, *common]) == 0
    assert "(5 3-way 1-shot tasks)" in capsys.readouterr().out

    query = [str(data / "0" / "5.png"), str(data / "3" / "2.png")]
    assert main(["predict", "--support", str(data), "--query", *query, *worn, *common]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == query
    assert all(line[1] in "0123" and 0.25 <= float(line[2]) <= 1 for line in lines)


def test_a_stopped_tune_goes_on(adapters, tmp_path, monkeypatch, capsys):
    data, output = str(adapters[1]), tmp_path / "kinds"
    command = ["tune", data, "--base", "demo", "--output", str(output), "--batch-size", "4", *QUICK, "--epochs", "2"]
    command += ["--save-last", "1"]
    assert main([*command, "--output", str(tmp_path / "unbroken")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["unbroken"]
    calls = 0
    original = tuning.normalize

    def stopped(*args):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(tuning, "CHECKPOINT_EVERY", 4)
    monkeypatch.setattr(tuning, "normalize", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    checkpoint = tmp_path / ".kinds.tuning.safetensors"
    assert checkpoint.exists()
    assert not output.exists()
    capsys.readouterr()
    assert main([*command, "--lr", "0.5"]) == 2
    assert "differs in settings.lr (0.001 there, 0.5 here)" in capsys.readouterr().err
    calls = 100
    assert main(command) == 0
    assert calls == 100 + 12, "only the steps after the checkpoint at 4 were repeated"
    assert Adapter.load(output).digest() == Adapter.load(tmp_path / "unbroken").digest()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["epoch-0002"]
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["recycle", "nowhere"], "nowhere"),
        (["evaluate", "digits"], "`--base` must name the model, got none"),
        (["evaluate", "digits", "--base", "no_such_vit"], "`base` must be a timm model name"),
        (["tune", "no-data", "--base", "demo", "--output", "x"], "`source` must be a folder"),
        (["evaluate", "no/data", "--base", "demo"], "there is no folder or file 'no/data' here; as a name of the Hub"),
        (["evaluate", "--base", "demo"], "`data` must name labelled images of new classes, got none"),
        (["evaluate", "digits", "--base", "demo", "--device", "gpu"], "`device` must be 'auto', 'cpu', 'cuda'"),
        (["predict", "--support", "nowhere", "--query", "a.png", "--base", "demo"], "nowhere"),
    ],
)
def test_bad_input_ends_with_one_line(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lorarecycle: error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(capsys):
    assert main(["evaluate", "digits", "--base", "demo", "--device", "cuda"]) == 2
    assert "`device` must be one that this machine has" in capsys.readouterr().err


def test_bad_settings_are_refused(capsys):
    assert main(["evaluate", "digits", "--base", "demo", "--n-way", "1"]) == 2
    assert "`n_way` must be at least 2" in capsys.readouterr().err


def test_what_would_fail_at_the_end_is_refused_at_the_start(adapters, tmp_path, capsys, monkeypatch):
    folder, data = adapters
    output = tmp_path / "meta"
    command = ["recycle", str(folder), "--base", "demo", "--output", str(output), "--meta.steps", "0", "--quiet"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "one class" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one class" / "a" / "1.png")
    for flags, message in (
        (["--layout", "vit"], "`layout` 'vit' must have transformers for its names"),
        (["--report-data", "nowhere"], "`source` must be a folder"),
        (["--report-data", str(tmp_path / "one class")], "must have at least two classes, got ['a']"),
        (["--output", str(folder / "01")], "`--output` must not be one of the adapters that go in"),
    ):
        assert main([*command, *flags]) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()
        assert not output.with_name("meta-run").exists()
    before = Adapter.load(folder / "01").digest()
    assert main(["warm-start", str(folder / "01"), str(folder / "23"), "--output", str(folder / "01")]) == 2
    assert "`--output` must not be one of the adapters that go in" in capsys.readouterr().err
    assert Adapter.load(folder / "01").digest() == before
    assert main([*command, "--report-data", str(data)]) == 0, "four classes of eight images are enough"
    measured = json.loads((output.with_name("meta-run") / "accuracy.json").read_text())
    assert (measured["tasks"]["n_way"], measured["tasks"]["n_query"]) == (4, 7)


def test_convert_names_folders_after_their_sources(adapters, tmp_path, capsys):
    folder, _ = adapters
    for name in ("lr-0.1", "lr-0.2", "other/lr-0.1"):
        shutil.copytree(folder / "01", tmp_path / name)
    names = [str(tmp_path / name) for name in ("lr-0.1", "lr-0.2", "other/lr-0.1")]
    assert main(["convert", *names, "--output", str(tmp_path / "out")]) == 2
    assert "`sources` must have different names" in capsys.readouterr().err
    assert main(["convert", *names[:2], "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lr-0.1", "lr-0.2"]


def test_the_plan_is_printed_and_nothing_done(adapters, tmp_path, capsys, monkeypatch):
    folder, _ = adapters
    monkeypatch.chdir(tmp_path)
    assert main(["recycle", str(folder), "--plan", "--device", "cpu", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("2 adapters of demo, on cpu in float32\n")
    for stage in ("warm start", "paint pictures", "guide features", "meta-training"):
        assert f"\n{stage} " in shown
    assert not list(tmp_path.iterdir())


def test_the_plan_comes_first_unless_quiet(adapters, tmp_path, capsys):
    folder, _ = adapters
    settings = ["--inversion.pictures", "5", "--meta.steps", "1", "--device", "cpu", "--dtype", "float32"]
    assert main(["recycle", str(folder), "--output", str(tmp_path / "a"), *settings]) == 0
    shown = capsys.readouterr()
    assert "needs: images, pictures, guide, warm start" in shown.err
    assert shown.out == f"{tmp_path / 'a'}\n"
    assert main(["recycle", str(folder), "--output", str(tmp_path / "b"), *settings, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_a_warm_start_from_weights_alone(adapters, tmp_path, capsys):
    folder, _ = adapters
    output = tmp_path / "start"
    assert main(["warm-start", str(folder), "--output", str(output), "--r", "3", "--gain", "2", "--device", "cpu"]) == 0
    made = Adapter.load(output)
    assert set(made.ranks.values()) == {3}
    assert made.head is None


def test_debug_shows_the_traceback(tmp_path, capsys):
    command = ["recycle", str(tmp_path / "nowhere")]
    assert main(command) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main([*command, "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("lorarecycle: error: ")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--meta.distill", "0.5"], ["--meta.guide-weight", "0.5"]),
        (["--meta.gain=2"], ["--meta.warm-start-gain=2"]),
        (["--inversion.init", "shapes"], ["--inversion.init", "painted"]),
        (["--inversion.init=shapes"], ["--inversion.init=painted"]),
    ],
)
def test_old_names_of_flags_work_and_say_so(old, new, caplog):
    assert current_flags(["recycle", "shapes", *old]) == ["recycle", "shapes", *new]
    assert " ".join(old).replace("=2", "").replace("=shapes", " shapes").removesuffix(" 0.5") in caplog.text
    assert "works until 0.3" in caplog.text


def test_a_flag_that_is_gone_says_why(capsys):
    assert main(["recycle", "somewhere", "--inversion.adapters_per_batch", "4"]) == 2
    assert "was removed in lorarecycle 0.2: batches of several adapters were slower" in capsys.readouterr().err

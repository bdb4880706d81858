"""`lorarecycle evaluate --method`: the table of methods, one that takes adapters, and what is said of bad input."""

import pytest

from lorarecycle import LabelledImages, load_dataset, tune
from lorarecycle.cli.main import main
from lorarecycle.vit.backbone import Backbone

pytestmark = pytest.mark.medium

COMMON = ["--base", "demo", "--quiet", "--device", "cpu", "--dtype", "float32", "--n-way", "3", "--n-query", "2"]
COMMON += ["--n-tasks", "3", "--n-validation-tasks", "2"]


def test_evaluate_takes_any_method(tmp_path, capsys):
    digits = load_dataset("digits", size=32)
    part: LabelledImages = digits.select_classes(["0", "1"]).subset(slice(0, 16))
    tune(Backbone.load("demo"), part, config={"epochs": 1}, quiet=True).save(tmp_path / "adapter")
    assert main(["evaluate", "--method", "list"]) == 0
    assert "| `lorahub` | LoRAHub | 1 adapter, fine-tuning, nevergrad |" in capsys.readouterr().out
    worn = ["--adapters", str(tmp_path / "adapter")]
    assert main(["evaluate", "digits", "--method", "warm-start", *worn, *COMMON]) == 0
    assert "(3 3-way 1-shot tasks)" in capsys.readouterr().out
    assert main(["evaluate", "digits", "--method", "linear-probe", "--validation", "digits", *COMMON]) == 0
    assert main(["evaluate", "digits", "--method", "linear-probe", "--rate", "0.01", *COMMON]) == 0
    capsys.readouterr()
    for flags, message in (
        (["--method", "best"], "`method` must be one of nn, average"),
        (["--method", "average"], "`adapters` must hold at least 1"),
        (["--method", "nn", "--rate", "0.1"], "`rate` must be left out for method 'nn'"),
        (["--method", "caml"], "`surrogates` must hold labelled images"),
        (["--method", "caml", "--surrogates", str(tmp_path / "gone")], "`--surrogates` must be a folder"),
        (["--method", "nn", "--validation", "digits"], "`--validation` must be left out for method 'nn'"),
        (["--method", "nn", "--validation-split", "val"], "`--validation-split` must be left out for method 'nn'"),
        (
            ["--method", "linear-probe", "--validation-split", "val"],
            "`--validation-split` must come with `--validation`, the data that it is a part of, got val alone",
        ),
        (
            ["--method", "linear-probe", "--validation", "digits", "--rate", "0.1"],
            "`--validation` must be left out beside `--rate`, got digits beside 0.1",
        ),
        (["--method", "full", "--distance", "cosine"], "`--distance` must be left out for method 'full'"),
        (["--tasks", str(tmp_path / "tasks.npz")], "`--n-query` must be left out beside `--tasks`"),
        (["--method", "nn", *worn], "`--adapters` must be left out for method 'nn', which does not use it"),
        (["--n-query", "500"], "`n_shot + n_query` must be at most"),
    ):
        assert main(["evaluate", "digits", *COMMON, *flags]) == 2
        assert message in capsys.readouterr().err


def test_the_seed_reaches_a_method_whose_rate_is_given(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "lorarecycle.fewshot.evaluate.evaluate", lambda *args, method, **kwargs: seen.update(method=method)
    )
    flags = ["--method", "lora-linear", "--rate", "0.01", "--seed", "7"]
    assert main(["evaluate", "digits", *COMMON, *flags]) == 0
    assert (seen["method"].seed, seen["method"].rate) == (7, 0.01)

"""How long a fit takes is said once it has begun, and follows from the number of adapters where nobody says."""

import logging

import pytest
import torch

from lorarecycle import generate
from lorarecycle.generate import GenerateConfig, training
from lorarecycle.runtime.checkpoint import Checkpoint


@pytest.mark.parametrize(
    ("count", "epochs"), [(2, 2000), (8, 2000), (9, 1250), (80, 250), (500, 40), (100_000, 1)], ids=str
)
def test_the_number_of_steps_decides_where_no_epochs_are_given(count, epochs):
    assert GenerateConfig().epochs_of(count) == epochs
    assert GenerateConfig(epochs=7).epochs_of(count) == 7


def test_a_fit_says_how_long_it_will_take(pool, vectors, quick, caplog):
    caplog.set_level(logging.INFO, logger=training.logger.name)
    generate.LoRAGenerator.fit(pool, vectors, config=quick, quiet=True)
    (line,) = [record.getMessage() for record in caplog.records if record.name == training.logger.name]
    assert line.startswith("fit icm-lora: 12 steps (4 epochs) of ")
    assert line.endswith("s in all; `epochs` (--epochs) makes it shorter")


def test_every_part_of_a_diffusion_is_forecast(pool, vectors, quick, caplog):
    """Each names the setting that makes it shorter."""
    caplog.set_level(logging.INFO, logger=training.logger.name)
    generate.CondPDiff.fit(pool, vectors, config={**quick, "diffusion_epochs": 5}, quiet=True)
    first, second = [record.getMessage() for record in caplog.records if record.name == training.logger.name]
    assert first.startswith("fit cond-p-diff autoencoder: 12 steps (4 epochs) of ")
    assert first.endswith("s in all; `epochs` (--epochs) makes it shorter")
    assert second.startswith("fit cond-p-diff diffusion: 5 steps (5 epochs) of ")
    assert second.endswith("s in all; `diffusion_epochs` makes it shorter")


@pytest.mark.parametrize(
    ("seconds", "epochs", "amount"), [(0.1, 2, "about 10 s"), (1, 12, "about 10 min"), (6, 60, "about 5.0 h")]
)
def test_the_forecast(seconds, epochs, amount):
    assert amount in training.forecast("fit", epochs, epochs, 50, seconds)


def test_no_more_epochs_than_the_minutes_allow(pool, vectors, quick, monkeypatch, tmp_path, caplog):
    """Timed beforehand at a second a step, three steps a pass: 9 seconds are three passes; a run that goes on keeps
    them, and ends with the bits of one that was not stopped."""
    caplog.set_level(logging.INFO, logger=training.logger.name)
    config = {**quick, "epochs": None, "minutes": 9 / 60}
    monkeypatch.setattr(training, "_seconds_of_a_step", lambda *a: 1.0)
    whole = generate.LoRAGenerator.fit(pool, vectors, config=config, quiet=True)
    assert len(whole.losses["reconstruction"]) == 9
    assert "larger limit fits more closely" in caplog.text

    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    kept = "~/fit.safetensors"
    write = Checkpoint.write

    def stopped(self, step):
        write(self, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            generate.LoRAGenerator.fit(pool, vectors, config=config, checkpoint=kept, quiet=True)
    monkeypatch.setattr(training, "_seconds_of_a_step", lambda *a: 100.0)
    again = generate.LoRAGenerator.fit(pool, vectors, config=config, checkpoint=kept, quiet=True)
    assert all(torch.equal(again.losses[name], losses) for name, losses in whole.losses.items())


def test_timing_leaves_nothing_behind(pool, vectors, quick, monkeypatch):
    timed = generate.LoRAGenerator.fit(pool, vectors, config=quick, quiet=True)
    monkeypatch.setattr(training, "_seconds_of_a_step", lambda *a: 1.0)
    untimed = generate.LoRAGenerator.fit(pool, vectors, config=quick, quiet=True)
    for name, tensor in untimed.model.state_dict().items():
        assert torch.equal(timed.model.state_dict()[name], tensor), name

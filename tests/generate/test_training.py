"""How long a fit takes is said once it has begun, and follows from the number of adapters where nobody says."""

import logging

import pytest

from lorarecycle import generate
from lorarecycle.generate import GenerateConfig, training


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
    assert line.endswith("s from now; `epochs` (--epochs) makes it shorter")


def test_every_part_of_a_diffusion_is_forecast(pool, vectors, quick, caplog):
    """Each names the setting that makes it shorter."""
    caplog.set_level(logging.INFO, logger=training.logger.name)
    generate.CondPDiff.fit(pool, vectors, config={**quick, "diffusion_epochs": 5}, quiet=True)
    first, second = [record.getMessage() for record in caplog.records if record.name == training.logger.name]
    assert first.startswith("fit cond-p-diff autoencoder: 12 steps (4 epochs) of ")
    assert first.endswith("s from now; `epochs` (--epochs) makes it shorter")
    assert second.startswith("fit cond-p-diff diffusion: 5 steps (5 epochs) of ")
    assert second.endswith("s from now; `diffusion_epochs` makes it shorter")


@pytest.mark.parametrize(
    ("seconds", "left", "amount"), [(0.1, 100, "about 10 s"), (1, 600, "about 10 min"), (6, 3000, "about 5.0 h")]
)
def test_the_forecast(seconds, left, amount):
    assert amount in training.forecast("fit", 3000, 2, seconds, left)

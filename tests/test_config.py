"""Settings are checked when they are made."""

import pytest

from lorarecycle import EvaluateConfig, InversionConfig, MetaConfig, RecycleConfig, TuneConfig
from lorarecycle.config import as_plain


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InversionConfig(steps=-1), "`steps` must be at least 0, got -1"),
        (lambda: InversionConfig(steps=0, init="noise"), "`steps` must be at least 1 with init=.noise., got 0"),
        (lambda: InversionConfig(init="zeros"), "`init` must be one of .*, got .zeros."),
        (lambda: InversionConfig(latent_size=0), "`latent_size` must be at least 1, got 0"),
        (lambda: InversionConfig(patience=0), "`patience` must be at least 1, got 0"),
        (lambda: InversionConfig(candidates=0), "`candidates` must be at least 1, got 0"),
        (lambda: InversionConfig(schedule="linear"), "`schedule` must be one of .*, got .linear."),
        (lambda: MetaConfig(init="warm"), "`init` must be one of .*, got .warm."),
        (lambda: MetaConfig(distill=2.0), "`distill` must be between 0 and 1, got 2.0"),
        (lambda: MetaConfig(gain=0.0), "`gain` must be positive and finite, got 0.0"),
        (lambda: MetaConfig(guide_size=0), "`guide_size` must be at least 1, got 0"),
        (lambda: RecycleConfig.preset("fast"), "`preset` must be one of .*, got .fast."),
        (lambda: InversionConfig(lr=-1), "`lr` must be positive and finite, got -1"),
        (lambda: InversionConfig(lr=float("nan")), "`lr` must be positive"),
        (
            lambda: InversionConfig(prune={3: 1.0}),
            r"`prune\[3\]` must be a ratio in \[0, 1\), got 1.0; no token",
        ),
        (lambda: InversionConfig(prune_from=1.5), "`prune_from` must be between 0 and 1"),
        (lambda: InversionConfig(roll=0.6), "`roll` must be between 0 and 0.5"),
        (lambda: InversionConfig(betas=(0.5, 2.0)), r"`betas\[1\]` must be between"),
        (lambda: MetaConfig(n_way=1), "`n_way` must be at least 2, got 1"),
        (lambda: MetaConfig(interpolation=1.2), "`interpolation` must be between 0 and 1"),
        (lambda: MetaConfig(distance="manhattan"), "`distance` must be one of .*'manhattan'"),
        (lambda: MetaConfig(sites=("w",)), "`sites` must name some of"),
        (lambda: MetaConfig(sparsity=1.0), r"`sparsity` must be in \[0, 1\)"),
        (lambda: MetaConfig(r=0), "`r` must be at least 1"),
        (lambda: TuneConfig(epochs=0), "`epochs` must be at least 1"),
        (lambda: EvaluateConfig(n_tasks=0), "`n_tasks` must be at least 1"),
        (lambda: RecycleConfig(seed=-1), "`seed` must be in"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_as_plain_is_json_ready():
    plain = as_plain(RecycleConfig(InversionConfig(prune={6: 0.5}), MetaConfig(layers=(0, 1))))
    assert plain["inversion"]["prune"] == {"6": 0.5}
    assert plain["meta"]["layers"] == [0, 1]
    assert plain["seed"] == 0

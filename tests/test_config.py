"""Settings are checked when they are made."""

from dataclasses import replace

import pytest

from lorarecycle import EvaluateConfig, InversionConfig, MetaConfig, RecycleConfig, TuneConfig
from lorarecycle.config import as_config, as_plain


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
        (lambda: MetaConfig(guide_weight=2.0), "`guide_weight` must be between 0 and 1, got 2.0"),
        (lambda: MetaConfig(warm_start_gain=0.0), "`warm_start_gain` must be positive and finite, got 0.0"),
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
        (lambda: MetaConfig(r=2.5), "`r` must be a whole number, got 2.5"),
        (lambda: MetaConfig(n_way=True), "`n_way` must be a whole number, got True"),
        (lambda: InversionConfig(prior_weight=float("inf")), "`prior_weight` must be at least 0 and finite, got inf"),
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


def test_settings_from_a_mapping():
    assert as_config(MetaConfig, None) == MetaConfig()
    assert as_config(MetaConfig, {"steps": 3}, default=MetaConfig(r=8)) == MetaConfig(r=8, steps=3)
    made = as_config(RecycleConfig, {"meta": {"steps": 3}, "seed": 5}, default=RecycleConfig.paper())
    assert made == replace(RecycleConfig.paper(), seed=5, meta=replace(RecycleConfig.paper().meta, steps=3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 1}, r"`meta` must name settings of MetaConfig \(steps, episodes_per_step, .*\), got step"),
        (3, "`meta` must be a MetaConfig or a mapping, got int"),
        (InversionConfig(), "`meta` must be a MetaConfig or a mapping, got InversionConfig"),
        ({"distill": 0.5, "guide_weight": 0.5}, "`distill` is the old name of `guide_weight`, got both"),
    ],
)
def test_no_settings(given, message):
    with pytest.raises(TypeError, match=message):
        as_config(MetaConfig, given, argument="meta")


def test_old_names_work_and_say_what_to_write_instead():
    with pytest.warns(DeprecationWarning, match="`distill` is called `guide_weight` since lorarecycle 0.2.*until 0.3"):
        config = MetaConfig(distill=0.5)
    assert config == MetaConfig(guide_weight=0.5)
    with pytest.warns(DeprecationWarning, match="`gain` is called `warm_start_gain`"):
        assert as_config(MetaConfig, {"gain": 2.0}).warm_start_gain == 2.0
    with pytest.warns(DeprecationWarning, match="`distill` is called"):
        assert config.distill == 0.5
    with pytest.warns(DeprecationWarning, match="`init='shapes'` is called `init='painted'`"):
        assert InversionConfig(init="shapes") == InversionConfig(init="painted")
    assert "distill" not in as_plain(config)


def test_what_is_gone_says_why():
    with pytest.raises(TypeError, match=r"`adapters_per_batch` was removed in lorarecycle 0.2: batches of several"):
        InversionConfig(adapters_per_batch=2)
    with pytest.raises(TypeError, match="`adapters_per_batch` was removed"):
        as_config(InversionConfig, {"adapters_per_batch": 2})


def test_presets():
    assert RecycleConfig.preset("default") == RecycleConfig.preset("weights") == RecycleConfig()
    assert RecycleConfig.preset("paper").inversion.steps == 2000

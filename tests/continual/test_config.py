"""What makes no sense is refused with its reason; methods are sets of options; automatic values."""

from __future__ import annotations

import pytest

from stabletrain.continual.config import ContinualConfig, resolve
from stabletrain.continual.presets import AGGREGATOR_NAMES, PRESETS
from stabletrain.errors import ConfigError
from stabletrain.training.config import fields_of, make_config


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_resolves_and_resolving_again_changes_nothing(method):
    whole = resolve(make_config(ContinualConfig, {"method": method}))
    assert resolve(whole) == whole
    assert whole.aggregator is not None
    for name, value in PRESETS[method].values.items():
        assert getattr(whole, name) == value


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("network", ["conv", "resnet18"])
def test_every_normalisation_resolves(network, norm):
    whole = resolve(make_config(ContinualConfig, {"network": network, "norm": norm}))
    assert resolve(whole) == whole
    assert (whole.statistics is None) == (norm != "batch")


def test_presets_name_options_only():
    for preset in PRESETS.values():
        assert set(preset.values) <= set(fields_of(ContinualConfig))
        assert preset.help.endswith(".")


def test_every_aggregator_is_a_method():
    assert set(AGGREGATOR_NAMES) <= set(PRESETS)


def test_an_option_exchanges_a_part_of_a_method():
    assert resolve(make_config(ContinualConfig, {"method": "er", "buffer": "herding"})).buffer == "herding"
    whole = resolve(make_config(ContinualConfig, {"method": "spcl", "orthogonality": "none"}))
    assert whole.orthogonality == "none"
    assert whole.aggregator == "spcl"


def test_published_settings():
    cifar = resolve(make_config(ContinualConfig, {"dataset": "cifar100"}))
    assert (cifar.network, cifar.batch_size, cifar.tasks, cifar.memory_per_class) == ("resnet18", 128, 10, 30)
    assert (cifar.learning_rate, cifar.norm_momentum, cifar.adam_epsilon) == (4e-4, 0.99, 1e-7)
    tiny = resolve(make_config(ContinualConfig, {"dataset": "tiny-imagenet", "timeline": "tiny-imagenet-t1"}))
    assert (tiny.batch_size, tiny.memory_per_class, tiny.tasks) == (32, 15, 0)


def test_released_windows_and_label_sets_are_the_seed_s():
    whole = resolve(make_config(ContinualConfig, {"dataset": "cifar100", "timeline": "released", "seed": 5}))
    assert whole.timeline == "cifar100-l2-t1"
    assert resolve(whole) == whole


BAD = {
    "--hidden does nothing with --network conv": {"network": "conv", "hidden": (8,)},
    "--depth does nothing with --network mlp": {"depth": 3},
    "unknown timeline 'rnadom'": {"timeline": "rnadom"},
    "--overlap does nothing with --timeline random": {"overlap": 0.2},
    "--tasks does nothing with --timeline cifar100-t0": {"timeline": "cifar100-t0", "tasks": 3},
    "--timeline-seed does nothing with --timeline cifar100-t0": {"timeline": "cifar100-t0", "timeline_seed": 3},
    "--timeline released needs a data set that has released ones": {"timeline": "released"},
    "--label-seed does nothing with --timeline cifar100-l0-t1": {"timeline": "cifar100-l0-t1", "label_seed": 1},
    "there is no timeline file nowhere.toml": {"timeline": "nowhere.toml"},
    "--class-range takes the smallest": {"class_range": (5, 2)},
    "--decomposition-alpha does nothing with --aggregator er": {"method": "er", "decomposition_alpha": 1.0},
    "--aggregator-scale does nothing with --aggregator sum": {"method": "sum", "aggregator_scale": "rmse"},
    "--scale-floor does nothing with --aggregator sum": {"method": "sum", "scale_floor": 0.1},
    "--scale-floor does nothing with --aggregator-scale none": {"aggregator_scale": "none", "scale_floor": 0.1},
    "--gram-precision float64 does nothing": {"gram_precision": "float64", "gradient_memory": "low"},
    "--weight-rate does nothing with --aggregator sum": {"method": "sum", "weight_rate": 0.1},
    "--buffer does nothing with --memory-per-class 0": {"memory_per_class": 0, "buffer": "released"},
    "--aggregator agem is a rule for a memory": {"method": "agem", "memory_per_class": 0},
    "the logits of DER are stored": {"method": "der", "buffer": "released"},
    "the edited pixels of GMED are stored": {"method": "gmed", "memory_per_class": 0, "aggregator": "mean"},
    "--replay-weight is of DER": {"method": "er", "replay_weight": 0.5},
    "--loss icarl needs exemplars": {"method": "icarl", "buffer": "reservoir"},
    "--loss margin is of angles": {"loss": "margin", "head": "linear"},
    "--orthogonality-weight does nothing without": {"method": "sum", "orthogonality_weight": 0.1},
    "first-of-block names no layer of --network mlp": {"orthogonality_layers": "first-of-block"},
    "--momentum does nothing with --optimizer adam": {"momentum": 0.9},
    "--beta1 does nothing with --optimizer sgd": {"optimizer": "sgd", "beta1": 0.8},
    "--restart is of one task after the other": {"method": "single", "timeline": "random"},
    "--norm-momentum and --statistics are of batch": {"network": "conv", "norm": "none", "norm_momentum": 0.9},
}  # fmt: skip


@pytest.mark.parametrize(("message", "values"), BAD.items(), ids=range(len(BAD)))
def test_nonsense_is_refused_with_its_reason(message, values):
    with pytest.raises(ConfigError) as error:
        resolve(make_config(ContinualConfig, values))
    assert message in str(error.value)

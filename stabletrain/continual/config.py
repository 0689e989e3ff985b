"""The options of `stabletrain continual`, and the values chosen for those left open.

Imports no JAX: the command line reads it to answer `--help`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stabletrain.continual.presets import (
    AGGREGATOR_NAMES,
    ARRANGEMENTS,
    AT_TASK_END,
    BUFFER_NAMES,
    FROM_STREAM,
    PRESETS,
    REHEARSAL_RULE_NAMES,
)
from stabletrain.continual.released_label_sets import RELEASED_LABEL_SETS
from stabletrain.continual.released_timelines import RELEASED, released_name
from stabletrain.errors import ConfigError, nearest
from stabletrain.training.config import LARGEST_SEED, TrainConfig, fields_of, option, replace

NETWORK_NAMES = ("mlp", "conv", "resnet18")
ORTHOGONALITY_NAMES = ("none", "dbt", "ocnn", "kernel", "kernel_cos")
OF_SEED = "released"
LAYER_CHOICES = ("inner", "all", "first-of-block")

SETTING, REHEARSAL, METHOD, FORWARD = "Tasks", "Rehearsal", "Method", "Orthogonal layers"
NETWORK, OPTIMISER, EVALUATION = "Network", "Optimiser", "Evaluation"


@dataclass(frozen=True, kw_only=True)
class ContinualConfig(TrainConfig):
    """Tasks that overlap in time, learned by one network. Values not given are the method's or the data's."""

    steps: int = option(0, "Number of training steps; 0: until the last task has ended. Fewer stop before.", minimum=0)
    batch_size: int = option(0, "Examples of each active task in a step; 0 chooses.", minimum=0)
    log_every: int = option(5, "Steps between rows of metrics.jsonl.", panel="Run directory", minimum=1)
    checkpoint_every: int = option(
        100, "Steps between checkpoints; one is also written at the end and when interrupted.",
        panel="Run directory", minimum=1, identity=False,
    )  # fmt: skip
    image_size: int = option(
        0, "Crop and resize images to this many pixels; 0: as the data set has them.", panel="Data", minimum=0
    )
    pixels: str = option(
        "unit", "Range of the network's inputs: unit is [0, 1], as released; signed is [-1, 1].", panel="Data",
        choices=("unit", "signed"),
    )  # fmt: skip

    tasks: int = option(0, "Tasks that the classes are dealt out to; 0 chooses.", panel=SETTING, minimum=0)
    timeline: str | None = option(
        None,
        f"When each task's data come: {', '.join(ARRANGEMENTS)}, a released one such as cifar100-l0-t2, {OF_SEED} (the "
        "data set's, label set and windows by the seed), or a FILE.toml; random where the method says nothing else.",
        panel=SETTING,
    )
    overlap: float | None = option(
        None, "staggered: share of a window that the next task's overlaps (0.5).", panel=SETTING, minimum=0.0,
        maximum=1.0,
    )  # fmt: skip
    class_range: tuple[int, ...] = option(
        (), "Unbalanced tasks: smallest and largest number of classes, e.g. 2,14.", panel=SETTING
    )
    label_seed: int | None = option(
        None, "Seed of the label sets; by default the run's.", panel=SETTING, minimum=0, maximum=LARGEST_SEED
    )
    timeline_seed: int | None = option(
        None, "Seed of the windows; by default the run's.", panel=SETTING, minimum=0, maximum=LARGEST_SEED
    )
    scenario: str = option(
        "class", "Classes among which an example is told: all begun so far (class), or those of its own task (task).",
        panel=SETTING, choices=("class", "task"),
    )  # fmt: skip
    epochs: int = option(1, "Passes over the data in each window.", panel=SETTING, minimum=1)

    buffer: str | None = option(None, "Rule that fills the rehearsal buffer.", panel=REHEARSAL, choices=BUFFER_NAMES)
    memory_per_class: int | None = option(
        None, "Capacity of the buffer, per class of the data; 0: nothing is kept.", panel=REHEARSAL, minimum=0
    )

    method: str = option(
        "spcl", "Method by name; each of its parts can be exchanged by its own option.", panel=METHOD,
        choices=tuple(PRESETS),
    )  # fmt: skip
    aggregator: str | None = option(
        None, "How the gradients of the tasks and of the memory become one update.", panel=METHOD,
        choices=(*AGGREGATOR_NAMES, *REHEARSAL_RULE_NAMES),
    )  # fmt: skip
    decomposition_alpha: float | None = option(
        None, "spcl: 0 only orthogonalises the gradients, large values also make them equally long.", panel=METHOD,
        minimum=0.0,
    )  # fmt: skip
    aggregator_scale: str | None = option(
        None, "spcl and aligned: length that the conditioned gradients get.", panel=METHOD,
        choices=("min", "median", "rmse", "none"),
    )  # fmt: skip
    scale_floor: float | None = option(
        None, "spcl and aligned: least length that they get, as a share of the largest singular value, so that the "
        "step cannot collapse (0.01 for spcl, 0 for the released ones).", panel=METHOD, minimum=0.0, maximum=1.0,
    )  # fmt: skip
    gram_precision: str = option(
        "float32", "Type of the gradients' Gram matrix and of what is made of it: float32 tells condition numbers up "
        "to some 1e3.", panel=METHOD, choices=("float32", "float64"),
    )  # fmt: skip
    weight_rate: float | None = option(
        None, "uw and gradnorm: learning rate of the weights that they learn (0.025).", panel=METHOD, minimum=0.0
    )
    gradient_memory: str = option(
        "fast", "Gradients of all tasks at once (fast), or one at a time and twice (low).", panel=METHOD,
        choices=("fast", "low"),
    )  # fmt: skip
    loss: str | None = option(
        None, "Cross-entropy, iCaRL's binary one with the old network's answers, or MDMT-R's with angular margins.",
        panel=METHOD, choices=("cross-entropy", "icarl", "margin"),
    )  # fmt: skip
    distill_weight: float | None = option(
        None, "DER's alpha: weight of the distance to the logits stored with an example; 0: none are stored.",
        panel=METHOD, minimum=0.0,
    )  # fmt: skip
    replay_weight: float | None = option(
        None, "DER++'s beta: weight of the loss of replayed labels beside the stored logits.", panel=METHOD,
        minimum=0.0,
    )  # fmt: skip
    edit_rate: float | None = option(
        None, "GMED's step in the pixels of replayed examples, towards those that a virtual update harms; 0: none.",
        panel=METHOD, minimum=0.0,
    )  # fmt: skip
    restart: bool | None = option(
        None, "Begin each task with a fresh network: what every task reaches alone.", panel=METHOD
    )

    orthogonality: str | None = option(
        None, "Regulariser of the layers: dbt is SPCL's, ocnn and kernel_cos are as released code has them.",
        panel=FORWARD, choices=ORTHOGONALITY_NAMES,
    )  # fmt: skip
    orthogonality_weight: float | None = option(None, "Its weight (lambda).", panel=FORWARD, minimum=0.0)
    orthogonality_layers: str | None = option(None, "Which layers it holds.", panel=FORWARD, choices=LAYER_CHOICES)
    orthogonality_when: str | None = option(
        None, "Add its gradient to the aggregate (after) or to each task's gradient, as released (before).",
        panel=FORWARD, choices=("after", "before"),
    )  # fmt: skip

    network: str | None = option(None, "Network.", panel=NETWORK, choices=NETWORK_NAMES)
    hidden: tuple[int, ...] = option((), "mlp: sizes of the hidden layers.", panel=NETWORK)
    depth: int = option(0, "conv: convolutions in a row.", panel=NETWORK, minimum=0)
    width: int = option(0, "conv, resnet18: channels of the first layer.", panel=NETWORK, minimum=0)
    norm: str | None = option(None, "conv, resnet18: normalisation.", panel=NETWORK, choices=("none", "batch", "group"))
    norm_momentum: float = option(
        0.0, "Momentum of the running batch statistics (0.99, as released).", panel=NETWORK, minimum=0.0, maximum=1.0
    )
    norm_epsilon: float = option(0.0, "Added to variances (1e-3, as released).", panel=NETWORK, minimum=0.0)
    max_pool: bool | None = option(None, "resnet18: 2x2 max-pooling after the stem.", panel=NETWORK)
    inner_relu: bool | None = option(None, "resnet18: a ReLU before the addition, as released.", panel=NETWORK)
    conv_bias: bool | None = option(None, "resnet18: biases in the convolutions, as released.", panel=NETWORK)
    head: str | None = option(
        None, "Last layer: linear, or the cosine of unit features and weights.", panel=NETWORK,
        choices=("linear", "cosine"),
    )  # fmt: skip

    optimizer: str = option("adam", "Optimiser.", panel=OPTIMISER, choices=("adam", "sgd"))
    learning_rate: float = option(0.0, "Learning rate; 0 chooses.", panel=OPTIMISER, minimum=0.0)
    momentum: float | None = option(None, "sgd: momentum.", panel=OPTIMISER, minimum=0.0, maximum=0.9999999)
    beta1: float | None = option(
        None, "adam: decay of the first moment.", panel=OPTIMISER, minimum=0.0, maximum=0.9999999
    )
    beta2: float | None = option(
        None, "adam: decay of the second moment.", panel=OPTIMISER, minimum=0.0, maximum=0.9999999
    )
    adam_epsilon: float = option(
        0.0, "adam: added to the root of the second moment (1e-7).", panel=OPTIMISER, minimum=0.0
    )

    measure_every: int = option(
        0, "Also measure every task's accuracy each so many steps; starts and ends of tasks are measured always.",
        panel=EVALUATION, minimum=0,
    )  # fmt: skip
    statistics: str | None = option(
        None, "Batch normalisation in tests: running statistics, or those of the test batch.", panel=EVALUATION,
        choices=("running", "batch"),
    )  # fmt: skip

    def check(self) -> None:
        """Raises: `ConfigError` for options that contradict each other or would do nothing."""
        for problem in _problems(self):
            raise ConfigError(problem)


# --- what makes no sense ----------------------------------------------------------------------------------------------

ONLY_FOR: dict[str, tuple[str, ...]] = {
    "hidden": ("mlp",), "depth": ("conv",), "width": ("conv", "resnet18"), "norm": ("conv", "resnet18"),
    "norm_momentum": ("conv", "resnet18"), "norm_epsilon": ("conv", "resnet18"), "max_pool": ("resnet18",),
    "inner_relu": ("resnet18",), "conv_bias": ("resnet18",),
}  # fmt: skip
"""Options that only some networks have."""

FORWARD_OPTIONS = ("orthogonality_weight", "orthogonality_layers", "orthogonality_when")
SCALED = ("spcl", "spcl-released", "aligned-mtl")
LEARNED = ("uw", "gradnorm")
ELEMENTWISE = ("graddrop", "graddrop-released")


def _given(value: Any) -> bool:
    return value is not None and value != () and value != 0 and value is not False


def _problems(config: ContinualConfig) -> Iterator[str]:
    """What is wrong with a configuration, each as the sentence that the user reads."""
    whole = _with_method(config)
    yield from _setting_problems(whole)
    yield from _method_problems(config, whole)
    network = network_of(config)
    for name, networks in ONLY_FOR.items():
        if getattr(config, name) is not None and _given(getattr(config, name)) and network not in networks:
            flag = "--" + name.replace("_", "-")
            yield f"{flag} does nothing with --network {network}: it belongs to {' and '.join(networks)}"
    for name in FORWARD_OPTIONS:
        if _given(getattr(config, name)) and whole.orthogonality in (None, "none"):
            yield f"--{name.replace('_', '-')} does nothing without --orthogonality (--method {config.method} has none)"
    if whole.orthogonality_layers == "first-of-block" and network != "resnet18":
        yield f"--orthogonality-layers first-of-block names no layer of --network {network}, which has no blocks"
    if config.norm == "none" and config.norm_epsilon:
        yield "--norm-epsilon does nothing with --norm none"
    if config.norm in ("none", "group") and (config.norm_momentum or config.statistics):
        yield f"--norm-momentum and --statistics are of batch statistics, and --norm {config.norm} has none"
    if config.statistics == "batch" and network == "mlp":
        yield "--statistics does nothing with --network mlp, which has no batch normalisation"
    for name in ("beta1", "beta2", "adam_epsilon"):
        if _given(getattr(config, name)) and config.optimizer != "adam":
            yield f"--{name.replace('_', '-')} does nothing with --optimizer {config.optimizer}"
    if _given(config.momentum) and config.optimizer != "sgd":
        yield f"--momentum does nothing with --optimizer {config.optimizer}"


def _is_fixed(timeline: str) -> bool:
    return timeline in RELEASED or timeline == OF_SEED or timeline.endswith(".toml")


def _has_label_sets(timeline: str) -> bool:
    named = timeline in RELEASED and bool(RELEASED[timeline].classes)
    return named or timeline == OF_SEED or timeline.endswith(".toml")


def _setting_problems(config: ContinualConfig) -> Iterator[str]:
    timeline = config.timeline or ""
    fixed = _is_fixed(timeline)
    if not fixed and timeline not in ARRANGEMENTS:
        known = (*ARRANGEMENTS, OF_SEED, *RELEASED)
        yield f"unknown timeline {timeline!r}: {nearest(timeline, known)}, or a file that ends in .toml"
    if timeline.endswith(".toml") and not Path(timeline).is_file():
        yield f"there is no timeline file {timeline}: expected a TOML file with a [[task]] for each task"
    if config.overlap is not None and config.timeline != "staggered":
        yield f"--overlap does nothing with --timeline {config.timeline}: it belongs to staggered"
    if config.class_range:
        if fixed:
            yield f"--class-range does nothing with --timeline {config.timeline}, which says how many classes there are"
        if len(config.class_range) != 2 or not 1 <= config.class_range[0] <= config.class_range[1]:
            yield "--class-range takes the smallest and the largest number of classes, such as 2,14"
    if fixed and config.tasks:
        yield f"--tasks does nothing with --timeline {config.timeline}, which says how many there are"
    if fixed and config.timeline_seed is not None:
        yield f"--timeline-seed does nothing with --timeline {config.timeline}, whose windows are given"
    if timeline == OF_SEED and released_name(config.dataset, config.seed) is None:
        data = ", ".join(RELEASED_LABEL_SETS)
        yield f"--timeline {OF_SEED} needs a data set that has released ones: --dataset {data}, not {config.dataset}"
    if _has_label_sets(timeline) and config.label_seed is not None:
        yield f"--label-seed does nothing with --timeline {config.timeline}, whose classes are given"


def _method_problems(config: ContinualConfig, whole: ContinualConfig) -> Iterator[str]:
    rule = whole.aggregator or ""
    if config.decomposition_alpha is not None and rule not in ("spcl", "spcl-released"):
        yield f"--decomposition-alpha does nothing with --aggregator {rule}: it belongs to spcl"
    if config.aggregator_scale is not None and rule not in SCALED:
        yield f"--aggregator-scale does nothing with --aggregator {rule}: it belongs to {', '.join(SCALED)}"
    if config.scale_floor is not None and rule not in SCALED:
        yield f"--scale-floor does nothing with --aggregator {rule}: it belongs to {', '.join(SCALED)}"
    if config.scale_floor and config.aggregator_scale == "none":
        yield "--scale-floor does nothing with --aggregator-scale none"
    if config.gram_precision == "float64" and (config.gradient_memory == "low" or rule in ELEMENTWISE):
        why = f"--aggregator {rule}" if rule in ELEMENTWISE else "--gradient-memory low, whose products are float32"
        yield f"--gram-precision float64 does nothing with {why}"
    if config.weight_rate is not None and rule not in LEARNED:
        yield f"--weight-rate does nothing with --aggregator {rule}: it belongs to {' and '.join(LEARNED)}"
    without_memory = whole.memory_per_class == 0
    if without_memory and config.buffer is not None:
        yield "--buffer does nothing with --memory-per-class 0"
    if not without_memory and rule == "current":
        yield "--aggregator current never asks the memory: use --memory-per-class 0"
    if without_memory and rule in REHEARSAL_RULE_NAMES and rule != "current":
        yield f"--aggregator {rule} is a rule for a memory: --memory-per-class must be above 0"
    stored = {"distill_weight": "the logits of DER", "edit_rate": "the edited pixels of GMED"}
    for name, what in stored.items():
        if _given(getattr(whole, name)) and (without_memory or whole.buffer not in FROM_STREAM):
            kept = "no memory" if without_memory else f"--buffer {whole.buffer}"
            yield f"{what} are stored with an example in its slot, and {kept} has none: use --buffer reservoir"
    if config.replay_weight is not None and not whole.distill_weight:
        yield "--replay-weight is of DER++: it does nothing without --distill-weight"
    if whole.loss == "icarl" and (without_memory or whole.buffer not in AT_TASK_END):
        yield "--loss icarl needs exemplars that are chosen when a task ends: --buffer herding or released"
    if whole.loss == "icarl" and _given(whole.distill_weight):
        yield "--loss icarl distils by itself: --distill-weight belongs to cross-entropy and margin"
    if whole.loss == "margin" and whole.head == "linear":
        yield "--loss margin is of angles: use --head cosine"
    if whole.head == "cosine" and whole.loss == "icarl":
        yield "--loss icarl is of independent sigmoids, which --head cosine keeps between 0.27 and 0.73: use linear"
    if whole.restart and (not without_memory or whole.timeline != "serial"):
        yield "--restart is of one task after the other and without memory: --timeline serial --memory-per-class 0"


# --- automatic values -------------------------------------------------------------------------------------------------

PAPER_MLP = {"hidden": (128, 64), "learning_rate": 3e-3}
PAPER_RESNET = {"width": 64, "norm": "batch", "max_pool": True, "inner_relu": True, "conv_bias": True}
SMALL_CONV = {"depth": 3, "width": 32, "norm": "none", "learning_rate": 2e-3}

BY_DATA: dict[str, dict[str, Any]] = {
    "digits": {"network": "mlp", "batch_size": 16, "tasks": 5, "memory_per_class": 5, "learning_rate": 3e-3},
    "emnist": {"network": "mlp", "batch_size": 128, "tasks": 5, "memory_per_class": 5, "learning_rate": 3e-3},
    "emnist-byclass": {"network": "mlp", "batch_size": 128, "tasks": 5, "memory_per_class": 5, "learning_rate": 3e-3},
    "cifar10": {"network": "conv", "batch_size": 32, "tasks": 5, "memory_per_class": 30, "learning_rate": 2e-3},
    "cifar100": {"network": "resnet18", "batch_size": 128, "tasks": 10, "memory_per_class": 30, "learning_rate": 4e-4},
    "tiny-imagenet": {
        "network": "resnet18", "batch_size": 32, "tasks": 10, "memory_per_class": 15, "learning_rate": 5e-4,
    },
}  # fmt: skip
"""Settings of the released experiments; digits, MNIST and the like as their PS-EMNIST."""


def network_of(config: ContinualConfig) -> str:
    """The network's name, also of a configuration that leaves it open."""
    return config.network or _of_data(config)["network"]


def _of_data(config: ContinualConfig) -> dict[str, Any]:
    name = config.dataset if config.data is None or config.dataset != "digits" else ""
    return BY_DATA.get(name, {**BY_DATA["digits"], "batch_size": 32})


def is_open(config: ContinualConfig, name: str) -> bool:
    """Whether an option was left to `resolve`: None, or the 0 or () that is its default and means "choose"."""
    value, default = getattr(config, name), fields_of(type(config))[name].default
    return value is None or (value == default and default in (0, ()) and not isinstance(value, bool))


def _filled_in(config: ContinualConfig, values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if is_open(config, name)}


def _with_method(config: ContinualConfig) -> ContinualConfig:
    """With the values of the method and the memory's; not checked, because `check` asks for it."""
    values = _filled_in(config, dict(PRESETS[config.method].values))
    # What belongs to a part of the method that an option has exchanged goes with it.
    if config.orthogonality == "none":
        values = {name: value for name, value in values.items() if name not in FORWARD_OPTIONS}
    if config.aggregator not in (None, PRESETS[config.method].values["aggregator"]):
        values.pop("decomposition_alpha", None)
    if config.memory_per_class == 0:
        values.pop("buffer", None)
    if config.distill_weight == 0:
        values.pop("replay_weight", None)
    config = dataclasses.replace(config, **values)
    general = {
        "timeline": "random",
        "memory_per_class": _of_data(config)["memory_per_class"],
        "loss": "cross-entropy",
        "head": "cosine" if config.loss == "margin" else "linear",
        "orthogonality": "none",
        "restart": False,
        "distill_weight": 0.0,
        "edit_rate": 0.0,
    }
    config = dataclasses.replace(config, **_filled_in(config, general))
    return dataclasses.replace(config, buffer=config.buffer or ("released" if config.memory_per_class else None))


def resolve(config: ContinualConfig) -> ContinualConfig:
    """Every automatic value filled in: the method's, then the data's and the network's.

    `steps` may stay 0: how long the timeline is, is known when the data are.
    """
    config.check()
    whole = _with_method(config)
    of_data, network = dict(_of_data(config)), network_of(config)
    of_network = {"mlp": PAPER_MLP, "conv": SMALL_CONV, "resnet18": PAPER_RESNET}[network]
    chosen: dict[str, Any] = {"network": network, **of_network}
    if network == of_data["network"]:
        chosen |= of_data
    if whole.timeline == OF_SEED:
        whole = dataclasses.replace(whole, timeline=released_name(config.dataset, config.seed))
    fixed = _is_fixed(filled(whole.timeline))
    chosen |= {name: of_data[name] for name in ("batch_size", "memory_per_class")}
    chosen["tasks"] = 0 if fixed else of_data["tasks"]
    chosen.setdefault("learning_rate", 5e-4)
    norm = whole.norm or chosen.get("norm", "none")
    if norm == "batch":
        chosen |= {"norm_momentum": 0.99, "statistics": "running"}
    if norm != "none":
        chosen["norm_epsilon"] = 1e-3
    if whole.timeline == "staggered":
        chosen["overlap"] = 0.5
    if config.optimizer == "adam":
        chosen |= {"beta1": 0.9, "beta2": 0.999, "adam_epsilon": 1e-7}
    else:
        chosen["momentum"] = 0.0
    if whole.aggregator in ("spcl", "spcl-released"):
        chosen |= {"decomposition_alpha": 10.0}
    if whole.aggregator in SCALED:
        chosen |= {"aggregator_scale": "rmse" if whole.aggregator == "spcl" else "min"}
        bounded = whole.aggregator == "spcl" and whole.aggregator_scale != "none"
        chosen |= {"scale_floor": 0.01 if bounded else 0.0}
    if whole.aggregator in LEARNED:
        chosen |= {"weight_rate": 0.025}
    if whole.distill_weight:
        chosen |= {"replay_weight": 0.0}
    if whole.orthogonality != "none":
        chosen |= {"orthogonality_weight": 1e-3, "orthogonality_layers": "inner", "orthogonality_when": "after"}
    return replace(whole, **_filled_in(whole, chosen))


Value = TypeVar("Value")


def filled(value: Value | None) -> Value:
    """An option's value after `resolve`. Raises: `ValueError` for a configuration that was not resolved."""
    if value is None:
        raise ValueError("the configuration has open values: call resolve(config) first")
    return value

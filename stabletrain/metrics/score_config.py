"""The options of judging generated images, for every family that generates them. Imports no JAX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stabletrain.metrics.protocol import SCORES
from stabletrain.training.config import TrainConfig, fields_of, option

PANEL = "Evaluation"


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(TrainConfig):
    """How many images an evaluation generates, and what they are judged by."""

    eval_samples: int | None = option(
        None,
        "Generated images that an evaluation judges; 0: none, which is chosen where no labels are known to train a "
        "classifier on, unless the Inception is asked for.",
        panel=PANEL,
        minimum=0,
    )
    scores: tuple[str, ...] = option(
        ("fd",),
        "Scores of the generated images: Frechet and kernel distance, classifier score, precision and recall, density "
        "and coverage, PRD, Frechet distance within classes, classification accuracy.",
        panel=PANEL,
        choices=tuple(SCORES),
    )
    score_split: str | None = option(
        None,
        "Real images to compare with; by default the test split where there is one.",
        panel=PANEL,
        choices=("train", "test"),
    )
    extractor: str | None = option(
        None,
        "Network that gives the features: a classifier trained on the data set (default), or the 2015 Inception.",
        panel=PANEL,
        choices=("classifier", "inception"),
    )
    inception: str | None = option(
        None,
        "File of the Inception's weights (.pth, .npz, .safetensors), if not in the cache; implies --extractor "
        "inception.",
        panel=PANEL,
        identity=False,
    )

    inception_resize: str | None = option(
        None,
        "How images come to the Inception's 299 pixels: as its own graph has it (tf1-bilinear, the default), or as "
        "pytorch-fid and PyTorch-StudioGAN do.",
        panel=PANEL,
        choices=("tf1-bilinear", "pytorch-fid"),
    )

    def check(self) -> None:
        """Raises: `ConfigError` for options that contradict each other or would do nothing."""
        from stabletrain.errors import ConfigError

        for problem in score_problems(self):
            raise ConfigError(problem)


SCORE_OPTIONS = tuple(name for name in fields_of(ScoreConfig) if name not in fields_of(TrainConfig))
"""The names of these options; they say how a model is judged and may be changed by `stabletrain evaluate`."""


def chosen_extractor(config: ScoreConfig) -> str:
    """`classifier` or `inception`."""
    return config.extractor or ("inception" if config.inception else "classifier")


def chosen_resize(config: ScoreConfig) -> str | None:
    """How images come to the Inception's size; None where it is not the extractor."""
    return (config.inception_resize or "tf1-bilinear") if chosen_extractor(config) == "inception" else None


def score_problems(config: ScoreConfig) -> Iterator[str]:
    """What is wrong with these options, each as the sentence that the user reads."""
    if config.inception and config.extractor == "classifier":
        yield "--inception does nothing with --extractor classifier"
    if config.inception_resize and chosen_extractor(config) != "inception":
        yield "--inception-resize is of the 2015 Inception's features: add --extractor inception"
    if config.eval_samples and config.eval_samples < FEWEST:
        yield f"--eval-samples {config.eval_samples} is too few for a score: at least {FEWEST}, or 0 for none"
    if len(set(config.scores)) < len(config.scores):
        yield f"--scores names one twice: {', '.join(config.scores)}"
    if config.eval_samples == 0 and (asked := judging_asked(config)):
        yield (
            f"{asked} does nothing where no samples are judged (--eval-samples 0, given or chosen): add --eval-samples "
            "N, and --extractor inception where the data have no labels"
        )


def judging_asked(config: ScoreConfig) -> str | None:
    """An option that only judged samples have a use for, as the user writes it; None where none is given.

    Of the split and of `--extractor classifier` a resolved configuration does not say whether they were given.
    """
    if config.scores not in ((), fields_of(ScoreConfig)["scores"].default):
        return f"--scores {','.join(config.scores)}"
    if config.inception:
        return f"--inception {config.inception}"
    return "--extractor inception" if config.extractor == "inception" else None


FEWEST = 10
"""Samples: ten splits of a score, twenty clusters of twice as many, five neighbours."""

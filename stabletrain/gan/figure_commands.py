"""`stabletrain gan value-surfaces` and `stabletrain gan gradient-norms`: the toy figures of WGAN-GP as commands.

They train many small critics in one process. What is finished is kept below `--out` and not computed again; a changed
setting is computed anew. Imports no JAX until a command runs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from stabletrain.errors import EXIT_OK, ConfigError
from stabletrain.training.config import LARGEST_SEED, option
from stabletrain.training.presets import settings_from

TOYS = ("gaussians8", "gaussians25", "swissroll")


@dataclass(frozen=True, kw_only=True)
class SurfaceOptions:
    """Settings of the value surfaces; the defaults are those of the small scale, for two CPU cores."""

    datasets: tuple[str, ...] = option(TOYS, "Toys, a column each.", choices=TOYS)
    generators: tuple[str, ...] = option(
        ("noise", "trained"), "Fakes: real points plus noise, or a trained generator.", choices=("noise", "trained")
    )
    width: int = option(128, "Units of each hidden layer.", minimum=1)
    hidden: int = option(3, "Hidden layers.", minimum=1)
    batch_size: int = option(256, "Points in a step.", minimum=1)
    critic_steps: int = option(5, "Critic steps per round.", minimum=1)
    fixed_steps: int = option(600, "Rounds against fixed fakes.", minimum=1)
    trained_steps: int = option(2000, "Generator steps.", minimum=1)
    clip: float = option(0.01, "Limit of the weights under clipping.", minimum=0.0)
    penalty: float = option(10.0, "Weight of the penalty against fixed fakes.", minimum=0.0)
    penalty_rate: float = option(1e-4, "Learning rate with the penalty (Adam).", minimum=0.0)
    clip_rate: float = option(5e-5, "Learning rate with clipping (RMSProp).", minimum=0.0)
    fixed_rates: float = option(
        10.0, "Factor of both learning rates against fixed fakes; the paper gives none.", minimum=0.0
    )
    trained_penalty: float = option(
        0.1, "Weight of the penalty where the generator trains, as in the released toy.", minimum=0.0
    )
    trained_rates: float = option(
        10.0, "Factor of both learning rates where the generator trains; the release has 1.", minimum=0.0
    )
    grid: int = option(128, "Points of the grid along each axis.", minimum=2)
    extent: float = option(2.0, "Half the width of the square that is drawn.", minimum=0.1)


@dataclass(frozen=True, kw_only=True)
class DepthOptions:
    """Settings of the gradient norms; the defaults are those of the small scale, for two CPU cores."""

    dataset: str = option("swissroll", "Toy.", choices=TOYS)
    width: int = option(128, "Units of each hidden layer.", minimum=1)
    hidden: int = option(12, "Hidden layers of critic and generator.", minimum=1)
    batch_size: int = option(64, "Points in a step.", minimum=1)
    critic_steps: int = option(5, "Critic steps per generator step.", minimum=1)
    steps: int = option(300, "Generator steps.", minimum=1)
    clips: tuple[float, ...] = option((0.1, 0.01, 0.001), "Limits of the weights, a curve each.", minimum=0.0)
    penalty: float = option(10.0, "Weight of the gradient penalty.", minimum=0.0)
    penalty_rate: float = option(1e-4, "Learning rate with the penalty (Adam).", minimum=0.0)
    clip_rate: float = option(5e-5, "Learning rate with clipping (RMSProp).", minimum=0.0)


def _progress(label: str, quiet: bool) -> Callable[[int, int], None] | None:
    if quiet:
        return None
    last = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 5:
            last = time.monotonic()
            print(f"{label}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return tick


def _finish(out: Path, name: str, document: Mapping[str, Any], files: Mapping[str, bytes], as_json: bool) -> int:
    text = json.dumps(document, indent=2) + "\n"
    for file, content in {**files, f"{name}.json": text.encode()}.items():
        (out / file).write_bytes(content)
    if as_json:
        metrics = document["metrics"]
        head = {"run_dir": str(out), "status": "done", "step": document["steps"], "metrics": metrics}
        print(json.dumps({**head, "files": sorted([*files, f"{name}.json"])}, indent=2))
    else:
        width = max(len(key) for key in document["metrics"])
        for key, value in document["metrics"].items():
            print(f"{key.ljust(width)}  {'-' if value is None else f'{value:.4g}'}")
        print("\n".join(str(out / file) for file in sorted(files)))
    return EXIT_OK


def _prepare(out: Path, parts: str) -> Path:
    from stabletrain.training.devices import configure_backend
    from stabletrain.training.run_directory import readable_errors

    folder = out / parts
    with readable_errors(out):
        folder.mkdir(parents=True, exist_ok=True)
    configure_backend(1, 1)
    return folder


CONFIG = typer.Option("--config", "-c", metavar="FILE.toml", help="Settings, with [small] and [paper].")
OUT = typer.Option("--out", "-o", metavar="DIR", help="Folder for figures (PNG, SVG), numbers (JSON) and parts.")
SCALE = typer.Option("--scale", metavar="small|paper", help="Which settings of the --config file to take.")
JSON = typer.Option("--json", help="Print one JSON document on stdout.")
QUIET = typer.Option("--quiet", "-q", help="No progress on stderr.")


def value_surfaces(
    out: Annotated[Path, OUT] = Path("results/value-surfaces"),
    preset: Annotated[Path | None, CONFIG] = None,
    scale: Annotated[str, SCALE] = "small",
    datasets: Annotated[list[str] | None, typer.Option(help="Toys, a column each. [default: all]")] = None,
    generators: Annotated[list[str] | None, typer.Option(help="noise, trained, or both. [default: both]")] = None,
    width: Annotated[int | None, typer.Option(help="Units of each hidden layer.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Points in a step.")] = None,
    fixed_steps: Annotated[int | None, typer.Option(help="Rounds against fixed fakes.")] = None,
    trained_steps: Annotated[int | None, typer.Option(help="Generator steps.")] = None,
    penalty: Annotated[float | None, typer.Option(help="Weight of the gradient penalty.")] = None,
    clip: Annotated[float | None, typer.Option(help="Limit of the weights under clipping.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of networks, data order and noise.")] = 0,
    as_json: Annotated[bool, JSON] = False,
    quiet: Annotated[bool, QUIET] = False,
) -> int:
    """Draw value surfaces of critics on toys: weight clipping above the gradient penalty (WGAN-GP, Figure 1a)."""
    given = {
        "datasets": datasets or None,
        "generators": generators or None,
        "width": width,
        "batch_size": batch_size,
        "fixed_steps": fixed_steps,
        "trained_steps": trained_steps,
        "penalty": penalty,
        "clip": clip,
    }
    options: SurfaceOptions = settings_from(SurfaceOptions, preset, scale, given)
    parts = _prepare(out, "parts")
    from stabletrain.gan.toy_training import METHODS, ToySettings
    from stabletrain.gan.value_surfaces import figure_files, surfaces_figure

    files: dict[str, bytes] = {}
    panels = []
    for generator in options.generators:
        of_figure = []
        for toy in options.datasets:
            for method in METHODS:
                trained = generator == "trained"
                factor = options.trained_rates if trained else options.fixed_rates
                settings = ToySettings(
                    toy=toy,
                    method=method,
                    generator=generator,
                    steps=options.trained_steps if trained else options.fixed_steps,
                    width=options.width,
                    hidden=options.hidden,
                    batch_size=options.batch_size,
                    critic_steps=options.critic_steps,
                    clip=options.clip,
                    penalty=options.trained_penalty if trained else options.penalty,
                    penalty_rate=factor * options.penalty_rate,
                    clip_rate=factor * options.clip_rate,
                    seed=seed,
                )
                label = f"{generator} {toy} {method}"
                of_figure.append(_kept_surface(parts, settings, options, _progress(label, quiet)))
        figure = surfaces_figure(of_figure)
        files |= figure_files(figure, f"value-surfaces-{'fixed' if generator == 'noise' else 'trained'}")
        panels += of_figure
    metrics = {}
    for panel in panels:
        name = f"{'fixed' if panel.generator == 'noise' else 'trained'}/{panel.toy}/{panel.method}"
        metrics[f"{name}/exact_wasserstein_500"] = panel.exact
        metrics[f"{name}/critic_estimate_500"] = panel.estimate
        metrics[f"{name}/lipschitz"] = panel.lipschitz
        if panel.modes_covered is not None:
            metrics[f"{name}/modes_covered_2500"] = panel.modes_covered
            metrics[f"{name}/high_quality_share_2500"] = panel.high_quality
    document = {
        "scale": scale,
        "settings": dataclasses.asdict(options) | {"seed": seed},
        "steps": options.trained_steps if "trained" in options.generators else options.fixed_steps,
        "metrics": metrics,
        "panels": [panel.numbers() for panel in panels],
    }
    return _finish(out, "value-surfaces", document, files, as_json)


def _kept_surface(parts: Path, settings: Any, options: SurfaceOptions, tick: Any) -> Any:
    """The panel from an earlier call with the same settings, else trained and kept."""
    import numpy as np

    from stabletrain.gan.value_surfaces import pack, surface, unpack

    asked = json.dumps(dataclasses.asdict(settings) | {"grid": options.grid, "extent": options.extent})
    path = parts / f"{settings.generator}-{settings.toy}-{settings.method}.npz"
    if path.is_file():
        with np.load(path) as archive:
            arrays = dict(archive)
        if str(arrays.pop("settings")) == asked:
            return unpack(arrays)
    panel = surface(settings, extent=options.extent, grid=options.grid, tick=tick)
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, settings=asked, **pack(panel))
    unfinished.replace(path)
    return panel


def gradient_norms(
    out: Annotated[Path, OUT] = Path("results/gradient-norms"),
    preset: Annotated[Path | None, CONFIG] = None,
    scale: Annotated[str, SCALE] = "small",
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="Toy. [default: swissroll]")] = None,
    width: Annotated[int | None, typer.Option(help="Units of each hidden layer.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden layers of critic and generator.")] = None,
    steps: Annotated[int | None, typer.Option(help="Generator steps.")] = None,
    clips: Annotated[list[float] | None, typer.Option(help="Limits of the weights, a curve each.")] = None,
    penalty: Annotated[float | None, typer.Option(help="Weight of the gradient penalty.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of networks, data order and noise.")] = 0,
    as_json: Annotated[bool, JSON] = False,
    quiet: Annotated[bool, QUIET] = False,
) -> int:
    """Measure the critic's gradient through its depth, with weight histograms (WGAN-GP, Figure 1b), in float64."""
    given = {
        "dataset": dataset,
        "width": width,
        "hidden": hidden,
        "steps": steps,
        "clips": clips or None,
        "penalty": penalty,
    }
    options: DepthOptions = settings_from(DepthOptions, preset, scale, given)
    if not options.clips:
        raise ConfigError("clips needs at least one limit: its histogram stands beside that of the penalty")
    parts = _prepare(out, "parts")
    from stabletrain.gan.depth_gradients import depth_figure
    from stabletrain.gan.toy_training import ToySettings
    from stabletrain.gan.value_surfaces import figure_files

    shared: dict[str, Any] = {
        "toy": options.dataset,
        "generator": "trained",
        "steps": options.steps,
        "width": options.width,
        "hidden": options.hidden,
        "batch_size": options.batch_size,
        "critic_steps": options.critic_steps,
        "penalty_rate": options.penalty_rate,
        "clip_rate": options.clip_rate,
        "dtype": "float64",
        "seed": seed,
    }
    found = []
    for clip in options.clips:
        settings = ToySettings(method="wgan", clip=clip, **shared)
        found.append(_kept_depth(parts, settings, f"weight clipping, c = {clip:g}", quiet))
    settings = ToySettings(method="wgan-gp", penalty=options.penalty, **shared)
    found.append(_kept_depth(parts, settings, "gradient penalty", quiet))
    # the paper shows the weights of the middle limit, 0.01
    shown = found[len(options.clips) // 2].label
    files = figure_files(depth_figure(found, histogram_of=shown), "gradient-norms")
    metrics: dict[str, float | None] = {}
    for each in found:
        metrics[f"{each.label}/slope_log10_per_layer"] = each.slope
        if each.at_limit is not None:
            metrics[f"{each.label}/weights_at_limit"] = each.at_limit
    document = {
        "scale": scale,
        "settings": dataclasses.asdict(options) | {"seed": seed},
        "steps": options.steps,
        "metrics": metrics,
        "curves": [each.numbers() for each in found],
    }
    return _finish(out, "gradient-norms", document, files, as_json)


def _kept_depth(parts: Path, settings: Any, label: str, quiet: bool) -> Any:
    """The curve from an earlier call with the same settings, else trained and kept."""
    import numpy as np

    from stabletrain.gan.depth_gradients import DepthGradients, depth_gradients

    asked = dataclasses.asdict(settings)
    path = parts / f"{label.replace(', c = ', '-').replace(' ', '-')}.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] == asked:
            histogram = kept["weight_histogram"]
            return DepthGradients(
                label=label,
                norms=np.array(kept["gradient_norms"]),
                slope=kept["slope_log10_per_layer"],
                at_limit=kept["weights_at_limit"],
                histogram=np.array(histogram["counts"]),
                edges=np.array(histogram["edges"]),
                seconds=kept["seconds"],
            )
    each = depth_gradients(settings, label, tick=_progress(label, quiet))
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps({**each.numbers(), "settings": asked}), encoding="utf-8")
    unfinished.replace(path)
    return each


def random_architectures(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder of runs named <row>-s<seed>.")],
    metric: Annotated[str, typer.Option(metavar="NAME", help="Score; larger is better.")],
    baseline: Annotated[str, typer.Option(metavar="ROW", help="Row that the others are compared with.")] = "gan",
    minimum: Annotated[
        list[float] | None, typer.Option(help="Thresholds. [default: twelve from noise to real data]")
    ] = None,
    scores_of: Annotated[
        list[Path] | None,
        typer.Option("--scores", metavar="FILE.csv", help="Scores of other architectures, as --out writes them."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Also write the tables there.")] = None,
    as_json: Annotated[bool, JSON] = False,
) -> int:
    """Compare methods over random architectures: who trains more of them (WGAN-GP, Tables 2 and 5), with tests."""
    from stabletrain.gan.random_architectures import (
        classifier_anchors,
        compare,
        grid,
        join_scores,
        read_scores,
        scores_from_csv,
        to_csv,
        to_document,
        to_markdown,
    )
    from stabletrain.training.run_directory import RunDirectory, is_run, readable_errors

    elsewhere = [scores_from_csv(path, metric) for path in scores_of or ()]
    scores = join_scores([*elsewhere, read_scores(study, metric)])
    config = next(RunDirectory.open(path).config_values for path in sorted(study.iterdir()) if is_run(path))
    anchors = None
    if "-classifier" in metric and metric.startswith("eval/cs"):
        _prepare(study, ".")
        anchors = classifier_anchors(config["dataset"], config.get("data"))
    if not minimum and anchors is None:
        raise ConfigError("--minimum is needed for a score that is not a classifier's")
    minimums = minimum or grid(*(anchors or (0.0, 0.0)))
    others = [row for row in scores if row != baseline]
    if not others:
        raise ConfigError(f"{study} has no row besides {baseline!r} to compare it with")
    comparisons = [compare(scores, baseline, row, minimums) for row in others]
    text = "\n".join(f"### {each.second}\n\n{to_markdown(each, metric, anchors)}" for each in comparisons)
    document = {
        "study": str(study),
        "scores": [str(path) for path in scores_of or ()],
        "comparisons": [to_document(each, metric, anchors) for each in comparisons],
    }
    if out is not None:
        with readable_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            for name, content in (
                ("success.md", text),
                ("success.json", json.dumps(document, indent=2) + "\n"),
                ("scores.csv", to_csv(scores, metric)),
            ):
                (out / f"random-architectures-{name}").write_text(content, encoding="utf-8")
    if as_json:
        metrics = {f"{each.second}/sign_p": to_document(each, metric, anchors)["sign_p"] for each in comparisons}
        head = {"run_dir": str(study), "status": "done", "step": 0, "metrics": metrics}
        print(json.dumps({**head, **document}, indent=2))
    else:
        print(text)
    return EXIT_OK

"""`stabletrain sample` and `stabletrain evaluate`: what a trained model makes, and how good it is."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from stabletrain.cli.families import all_families
from stabletrain.cli.options import fields_with_types, parameters, typed_values, union_of
from stabletrain.cli.progress import OpenReporter, make_reporter
from stabletrain.cli.stored import RUN, Trained, Work, find_run, load_trained, open_run
from stabletrain.cli.text import number, pairs, print_json
from stabletrain.cli.train import shown_path
from stabletrain.errors import EXIT_OK, ConfigError, RunDirectoryError, StableTrainError, nearest
from stabletrain.training.config import checked_values, flag
from stabletrain.training.experiment import Evaluation, Family

DESCRIPTION = "samples.json"
"""Says how the samples of a folder were made."""
SCRATCH = ".unfinished"

COMMON = {
    "run": (Annotated[str, RUN], inspect.Parameter.empty),
    "out": (
        Path | None,
        typer.Option(
            None, "--out", "-o", metavar="DIR", help="Folder. [default: samples/<step>-<settings> of the run]"
        ),
    ),
    "checkpoint": (str, typer.Option("newest", "--checkpoint", metavar="STEP|newest|best", help="Which checkpoint.")),
    "devices": (int, typer.Option(0, "--devices", help="Devices to use; 0: all.", min=0, show_default=False)),
    "as_json": (bool, typer.Option(False, "--json", help="Print one JSON document.")),
    "quiet": (bool, typer.Option(False, "--quiet", "-q", help="No progress on stderr.")),
}
"""Options of `sample` and `evaluate` whatever the family: name -> (type, option)."""


SAMPLE_HELP = """Make samples with a trained model: a run's, or one of published weights. Needs no data set.

`sample RUN`, or `sample --weights FILE` with a checkpoint of U-ViT, DDPM, improved DDPM or ADM.

Interrupted, it keeps the finished part, and the same command goes on from there.
"""
EVALUATE_HELP = """Evaluate a run's checkpoint as training does, or with other scores, samples and features.

The run's own rows are left as they are: scores go to RUN/eval/evaluate-<step>.json. Interrupted, it keeps what is
finished, and the same command goes on from there.
"""


WEIGHTS = typer.Option(
    None,
    "--weights",
    metavar="ema|raw|FILE",
    help="Of a run: its moving average or its last weights. Without a run: a published checkpoint (.pth, .pt, "
    ".safetensors or .npz).",
    show_default=False,
)
OF_A_RUN = ("ema", "raw")


def sample_command() -> Callable[..., int]:
    """The command, with the sampling options of every family that samples."""
    opener = next(family for family in all_families() if family.open_weights)  # the one family that opens files
    assert opener.weights_options is not None
    about_file = fields_with_types(opener.weights_options)

    def sample(
        run: str | None,
        out: Path | None,
        checkpoint: str,
        devices: int,
        as_json: bool,
        quiet: bool,
        weights: str | None,
        **given: Any,
    ) -> int:
        told = {name: given.pop(name) for name in about_file}
        if run is None:
            source = _opened(opener, weights, typed_values(about_file, told), checkpoint, devices)
        else:
            _refuse_file(weights, told)
            given["weights"] = weights
            trained = load_trained(find_run(run), with_data=False, which=checkpoint, devices=devices)
            source = _Source(
                trained.family,
                trained.experiment,
                trained.state,
                str(trained.run.path),
                {"run": trained.run.path.name, "step": trained.step},
                lambda digest: trained.run.path / "samples" / f"{trained.step:08d}-{digest}",
            )
        folder, files = _sample(source, given, out, quiet=quiet)
        if as_json:
            done: dict[str, Any] = {
                "run_dir": None if run is None else source.named,
                "status": "sampled",
                "step": source.settings.get("step"),
                "metrics": {},
            }
            print_json({**done, "out": folder, "files": files})
        else:
            what = {"network": source.what} if source.what else {}
            print(pairs({**what, "samples": str(shown_path(folder.absolute())), "files": _shortened(files)}))
        return EXIT_OK

    options = {
        family.name: {
            name: entry for name, entry in fields_with_types(family.sample_options).items() if name != "weights"
        }
        for family in all_families()
        if family.sample_options
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    heads = {**COMMON, "run": (Annotated[str | None, RUN], None), "weights": (str | None, WEIGHTS)}
    common = [inspect.Parameter(name, kind, default=info, annotation=of) for name, (of, info) in heads.items()]
    panel = "Sampling" if len(options) < 2 else f"Sampling (by family: {', '.join(options)})"
    own = [*parameters(union_of(options), panel), *parameters(about_file, "Published weights (--weights FILE)")]
    sample.__signature__ = inspect.Signature([*common, *own])  # type: ignore[attr-defined]
    sample.__annotations__ = {}
    sample.__doc__ = SAMPLE_HELP
    return sample


@dataclass(frozen=True)
class _Source:
    """A model to sample from: a run's at a checkpoint, or one out of a file."""

    family: Family
    experiment: Any
    state: Any
    named: str
    settings: Mapping[str, Any]
    """What tells these samples from those of another model."""
    folder: Callable[[str], Path]
    """Where samples go that were given no place, by the digest of their settings."""
    what: str = ""


def _opened(family: Family, weights: str | None, told: Mapping[str, Any], checkpoint: str, devices: int) -> _Source:
    """The model of a file. Raises: `ConfigError` without one, `DataError` for one that cannot be read."""
    if weights is None or weights in OF_A_RUN:
        raise ConfigError("name a RUN to sample from, or a file of published weights by --weights FILE")
    if checkpoint != "newest":
        raise ConfigError("--checkpoint does nothing with --weights FILE: it belongs to a run")
    assert family.open_weights is not None
    assert family.weights_options is not None
    file = Path(weights).expanduser()
    options = family.weights_options(**checked_values(family.weights_options, told, named=flag))
    opened = family.open_weights(file, options, devices=devices)
    with file.open("rb") as stream:
        settings = {"weights": file.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "told": told}
    return _Source(
        family,
        opened.experiment,
        opened.state,
        str(file),
        settings,
        lambda digest: Path("samples") / f"{file.stem}-{digest}",
        opened.what,
    )


def _refuse_file(weights: str | None, told: Mapping[str, Any]) -> None:
    """Raises: `ConfigError` for options of a published file beside a run."""
    if weights not in (None, *OF_A_RUN):
        hint = "give either the run or the file" if Path(str(weights)).is_file() else nearest(str(weights), OF_A_RUN)
        raise ConfigError(f"--weights {weights} is neither ema nor raw, the weights of a run: {hint}")
    for name, value in told.items():
        if value is not None:
            raise ConfigError(f"{flag(name)} does nothing with a run, which knows it: it belongs to --weights FILE")


def _sample(source: _Source, given: Mapping[str, Any], out: Path | None, *, quiet: bool) -> tuple[Path, list[str]]:
    family = source.family
    if family.sample is None or family.sample_options is None:
        raise ConfigError(f"{source.named} is a run of {family.name}, which makes no samples")
    values = _sampling_values(family, given)
    options = family.sample_options(**values)
    settings = {**source.settings, "options": values}
    if family.sample_inputs is not None and (inputs := family.sample_inputs(source.experiment, options)):
        settings["inputs"] = dict(inputs)
    folder = out or source.folder(_digest(settings))
    _refuse_other_content(folder, settings)

    def work(reporter: OpenReporter) -> Mapping[str, bytes]:
        from stabletrain.training.signals import StopRequest

        assert family.sample is not None
        with StopRequest() as stop:
            return family.sample(source.experiment, source.state, options, Work(folder / SCRATCH, reporter, stop))

    from stabletrain.training.run_directory import readable_errors

    with readable_errors(folder), make_reporter(quiet=quiet) as reporter:
        empty = not folder.is_dir() or not any(folder.iterdir())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        try:
            files = work(reporter)
        except StableTrainError:  # such as an option that cannot be followed: the corrected command finds it free
            if empty:
                shutil.rmtree(folder)
            raise
        for name, content in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    return folder, list(files)


def _sampling_values(family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    assert family.sample_options is not None
    typed = typed_values(fields_with_types(family.sample_options), given, what=f"option of sampling from {family.name}")
    return checked_values(family.sample_options, typed, named=flag)


def _refuse_other_content(folder: Path, settings: Mapping[str, Any]) -> None:
    """Samples of other settings are not mixed with these, nor other files overwritten."""
    if folder.is_file():
        raise RunDirectoryError(f"{folder} is a file: choose another --out")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunDirectoryError(f"{folder} is not empty: choose another --out") from None
    if found != json.loads(json.dumps(settings)):
        raise RunDirectoryError(f"{folder} holds samples of other settings (its {DESCRIPTION}): choose another --out")


def _shortened(files: list[str]) -> str:
    return ", ".join(files) if len(files) <= 6 else f"{', '.join(files[:3])}, ... {files[-1]} ({len(files)} files)"


def evaluate_command() -> Callable[..., int]:
    """The command, with the options of judging generated images."""

    def evaluate(run: str, checkpoint: str, devices: int, as_json: bool, quiet: bool, **given: Any) -> int:
        path = find_run(run)
        changes = _score_changes(path, given)
        trained = load_trained(path, with_data=True, which=checkpoint, devices=devices, changes=changes)
        name = f"evaluate-{trained.step}" + (f"-{_digest(changes)}" if changes else "")
        found = _evaluation(trained, name, quiet=quiet)
        scores = {name: float(value) for name, value in found.scalars.items()}
        # With other options than the run's, what it wrote itself stays as it is.
        files = {
            (f"eval/{name}/{file.replace('/', '-')}" if changes else file): content
            for file, content in found.files.items()
        }
        for file, content in files.items():
            trained.run.write_file(file, content)
        document = json.dumps({"step": trained.step, "options": changes, **scores}, indent=2) + "\n"
        trained.run.write_file(f"eval/{name}.json", document.encode())
        if as_json:
            done = {"run_dir": trained.run.path, "status": "evaluated", "step": trained.step, "metrics": scores}
            print_json({**done, "files": list(files)})
        else:
            print(pairs({"step": f"{trained.step:,}", **{name: number(value) for name, value in scores.items()}}))
            for file in files:
                print(shown_path(trained.run.path / file))
        return EXIT_OK

    kind = inspect.Parameter.KEYWORD_ONLY
    shared = {name: entry for name, entry in COMMON.items() if name != "out"}
    common = [inspect.Parameter(name, kind, default=info, annotation=of) for name, (of, info) in shared.items()]
    options = parameters(_score_fields(), "Judging; what is not given is as the run was configured")
    evaluate.__signature__ = inspect.Signature([*common, *options])  # type: ignore[attr-defined]
    evaluate.__annotations__ = {}
    evaluate.__doc__ = EVALUATE_HELP
    return evaluate


def _score_fields() -> dict[str, Any]:
    from stabletrain.metrics.score_config import SCORE_OPTIONS, ScoreConfig

    fields = fields_with_types(ScoreConfig)
    return {name: fields[name] for name in SCORE_OPTIONS}


def _score_changes(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of judging that were given. Raises: `ConfigError` where the run's family generates no images."""
    from stabletrain.metrics.score_config import ScoreConfig

    changes = typed_values(_score_fields(), given)
    if changes:
        run, family = open_run(path)
        if not issubclass(family.config, ScoreConfig):
            raise ConfigError(f"{run.path} is a run of {family.name}, which generates no images to judge")
    return changes


def _evaluation(trained: Trained, name: str, *, quiet: bool) -> Evaluation:
    """Evaluates, in a scratch folder that outlives an interruption."""
    from stabletrain.training.signals import StopRequest

    scratch = trained.run.path / "eval" / f".{name}"
    with make_reporter(quiet=quiet) as reporter, StopRequest() as stop:
        found = trained.experiment.evaluate(trained.state, trained.step, Work(scratch, reporter, stop))
    shutil.rmtree(scratch, ignore_errors=True)
    return found


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

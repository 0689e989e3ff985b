"""Options: every field of a config is one; files, shorthands and flags in order; everything unknown is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import typer

from stabletrain.cli.families import FAMILIES, all_families
from stabletrain.cli.options import fields_with_types, flag, read_preset, resolve, typed_values, union_of
from stabletrain.cli.train import RUN_OPTIONS, family_command
from stabletrain.errors import ConfigError
from stabletrain.training.config import LARGEST_SEED, checked_values
from tests.cli.conftest import Command
from tests.cli.toy import FAMILY, CommandToyConfig

FIELDS = fields_with_types(CommandToyConfig)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_of_a_family_is_an_option_and_no_name_is_taken_twice(name: str) -> None:
    family = FAMILIES[name]()
    app = typer.Typer()
    app.command()(family_command(family))
    declared = [word for parameter in typer.main.get_command(app).params for word in parameter.opts]
    for field in dataclasses.fields(family.config):
        assert flag(field.name) in declared
    assert len(declared) == len(set(declared))
    assert not set(RUN_OPTIONS) & {field.name for field in dataclasses.fields(family.config)}


def test_options_of_the_same_name_in_several_families_can_share_one_flag() -> None:
    """`sample` and `resume` offer the options of all families at once: a switch cannot also be a value."""
    for pick in (lambda family: family.config, lambda family: family.sample_options):
        kinds: dict[str, bool] = {}
        for family in [family for family in [*all_families(), FAMILY] if pick(family)]:
            for name, (_, annotation) in fields_with_types(pick(family)).items():
                assert kinds.setdefault(name, "bool" in str(annotation)) == ("bool" in str(annotation)), name


SEEDS = {"seed", "label_seed", "timeline_seed"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_seed_that_no_random_key_takes_is_refused_before_training_and_sampling(name: str) -> None:
    family = FAMILIES[name]()
    for options in filter(None, (family.config, family.sample_options)):
        seeds = SEEDS & set(fields_with_types(options))
        assert seeds
        for seed in seeds:
            assert checked_values(options, {seed: LARGEST_SEED}) == {seed: 2**32 - 1}
            with pytest.raises(ConfigError, match=f"'{seed}' is 4294967296, but must be at most 4294967295"):
                checked_values(options, {seed: LARGEST_SEED + 1})


@pytest.mark.parametrize("study", [("diffusion", "theory"), ("gan", "value-surfaces"), ("gan", "gradient-norms")])
def test_figures_of_a_seed_that_no_random_key_takes_are_refused(command: Command, study: tuple[str, str]) -> None:
    said = command(*study, "--seed", 2**32, "--out", "made")
    assert said.code == 2
    assert "--seed" in said.error
    assert "4294967295" in said.error
    assert not Path("made").exists()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("diffusion", "theory", "--width", 1), "--width is 1, but must be at least 2"),
        (("diffusion", "frontier", "--depths", 0), "--depths is 0, but must be at least 1"),
        (("diffusion", "import", "none.npz", "--heads", -2), "--heads is -2, but must be at least 0"),
    ],
)
def test_a_number_out_of_range_is_named_by_its_flag(
    command: Command, typed: tuple[str | int, ...], message: str
) -> None:
    said = command(*typed, "--out", "made")
    assert said.code == 2
    assert message in said.error
    assert not Path("made").exists()


def test_what_is_told_of_a_published_file_is_no_option_of_sampling() -> None:
    """`sample` has both: a name in both could not be told apart."""
    sampling = {
        name for family in all_families() if family.sample_options for name in fields_with_types(family.sample_options)
    }
    (opener,) = [family for family in all_families() if family.open_weights]
    assert opener.weights_options is not None
    assert not sampling & set(fields_with_types(opener.weights_options))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "12", 12),
        ("steps", "1e5", 100_000),
        ("steps", "1_000", 1000),
        ("learning_rate", "3", 3.0),
        ("learning_rate", "1e-3", 1e-3),
        ("bonus", "none", None),
        ("bonus", "-0.5", -0.5),
        ("data", "none", None),
        ("trouble", "none", "none"),  # here it is one of the choices
        ("sizes", ["1,2", "3"], (1, 2, 3)),
        ("sizes", [""], ()),
        ("mirror", True, True),
    ],
)
def test_text_becomes_a_value_of_the_field_s_type(name: str, text: Any, value: Any) -> None:
    found = typed_values(FIELDS, {name: text})[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "many", "--steps takes a whole number, not 'many'"),
        ("steps", "1.5", "--steps takes a whole number, not '1.5'"),
        ("steps", "inf", "--steps takes a whole number, not 'inf'"),
        ("learning_rate", "fast", "--learning-rate takes a number, not 'fast'"),
        ("sizes", ["1,x"], "--sizes takes a whole number, not 'x'"),
        ("colour", "gren", "unknown value 'gren' for --colour: did you mean 'green'?"),
    ],
)
def test_other_text_is_refused_with_what_was_expected(name: str, text: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        typed_values(FIELDS, {name: text})
    assert str(caught.value) == message


def test_long_whole_numbers_do_not_pass_through_a_float() -> None:
    seed = 2**62 + 1
    assert typed_values(FIELDS, {"seed": str(seed)})["seed"] == seed


# --- precedence -------------------------------------------------------------------------------------------------------


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "preset.toml"
    path.write_text(
        'family = "toy"\ncolour = "blue"\nwidth = 3\nlog-every = 7\n'
        '[row]\nlabel = "a row"\n[small]\nsteps = 5\nwidth = 4\n[paper]\nsteps = 500000\n'
    )
    return path


def test_defaults_then_preset_then_shorthands_then_flags(preset: Path) -> None:
    only_file = resolve(FAMILY, {}, preset=preset, scale="small")
    assert (only_file.config.colour, only_file.config.width, only_file.config.steps) == ("blue", 4, 5)  # type: ignore[attr-defined]
    assert only_file.config.log_every == 7
    with_shorthand = resolve(FAMILY, {}, preset=preset, scale="small", shorthands=["grass"])
    assert (with_shorthand.config.colour, with_shorthand.config.width) == ("green", 16)  # type: ignore[attr-defined]
    with_flag = resolve(FAMILY, {"width": "20"}, preset=preset, scale="small", shorthands=["grass"])
    assert (with_flag.config.colour, with_flag.config.width) == ("green", 20)  # type: ignore[attr-defined]
    assert with_flag.origin == {
        "colour": "--grass",
        "width": "command line",
        "steps": f"{preset} [small]",
        "log_every": f"{preset} [small]",
    }


def test_a_value_that_the_family_chose_is_marked_so() -> None:
    assert resolve(FAMILY, {}).origin == {"width": "chosen"}


def test_shorthands_that_contradict_each_other_need_the_option_itself() -> None:
    with pytest.raises(ConfigError, match="--grass and --sky both set --colour"):
        resolve(FAMILY, {}, shorthands=["grass", "sky"])


def test_a_shorthand_of_which_nothing_is_left_is_refused() -> None:
    """Explicit options win over a shorthand, but not over all of it without a word."""
    with pytest.raises(ConfigError, match="--sky stands for --colour blue and does nothing with --colour red: leave"):
        resolve(FAMILY, {"colour": "red"}, shorthands=["sky"])
    with pytest.raises(ConfigError, match="--grass stands for --colour green --width 16 and does nothing with"):
        resolve(FAMILY, {"colour": "red", "width": "4"}, shorthands=["grass"])
    assert resolve(FAMILY, {"colour": "red"}, shorthands=["grass"]).config.width == 16  # type: ignore[attr-defined]
    assert resolve(FAMILY, {"colour": "blue"}, shorthands=["sky"]).config.colour == "blue"  # type: ignore[attr-defined]


def test_a_combination_that_makes_no_sense_is_refused_wherever_its_parts_come_from(preset: Path) -> None:
    with pytest.raises(ConfigError, match="--mirror does nothing with --colour blue"):
        resolve(FAMILY, {"mirror": True}, preset=preset, scale="small")


@pytest.mark.parametrize(
    ("content", "scale", "message"),
    [
        ("colou = 'red'", None, "unknown option 'colou' in {path}: did you mean 'colour'?"),
        ("colour = 'rod'", None, "unknown value 'rod' for option 'colour' in {path}: did you mean 'red'?"),
        ("steps = 'x'", None, "option 'steps' in {path} takes a whole number, not 'x'"),
        ("log_every = 5\nbonus = 3", None, "option 'bonus' in {path} is 3.0, but must be at most 2.0"),
        ("family = 'gan'", None, "{path} is a preset of the family 'gan'"),
        ("[smal]\nsteps = 1", None, "unknown table [smal] in {path}: did you mean 'small'?"),
        ("[small]\nsteps = 1\n[paper]\nsteps = 2", None, "choose with --scale small or --scale paper"),
        ("[small]\nstep = 1", "small", "unknown option 'step' in {path} [small]: did you mean 'steps'?"),
        ("[small]\nsteps = 1", "papers", "has no scale 'papers'"),
        ("steps = 1", "small", "has no scale 'small': it has no table of that kind"),
        ("steps = ", None, "{path} is not a TOML file"),
    ],
)
def test_what_is_wrong_with_a_preset_is_said_with_the_file_and_the_nearest(
    tmp_path: Path, content: str, scale: str | None, message: str
) -> None:
    path = tmp_path / "preset.toml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_preset(path, FAMILY, scale)
    assert message.format(path=path) in str(caught.value)


def test_a_missing_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        read_preset(tmp_path / "no.toml", FAMILY, None)
    with pytest.raises(ConfigError, match="name one with --config"):
        resolve(FAMILY, {}, scale="small")


def test_the_config_of_a_run_is_a_preset(command: Command, toy_run: Path) -> None:
    said = command("toy", "--config", toy_run / "config.toml", "-n", "--json")
    assert said.document["config"]["steps"] == 9


def test_an_option_of_another_family_is_named_as_such() -> None:
    union = union_of({"toy": FIELDS})
    with pytest.raises(ConfigError, match="--kappa is no option of sampling from toy: "):
        typed_values(union, {"kappa": "1"}, what="option of sampling from toy")


# --- as command lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy", "--colou", "red"], "no such option --colou: did you mean --colour?"),
        (["toy", "--colour", "gren"], "unknown value 'gren' for --colour: did you mean 'green'?"),
        (["toy", "--steps"], "option '--steps' requires an argument"),
        (["toy", "--bonus", "3"], "error: --bonus is 3.0, but must be at most 2.0"),
        (["toi"], "no such command 'toi'. Did you mean 'toy'?"),
        (["data", "lst"], "no such command 'lst'. Did you mean 'list'?"),
        (["toy", "surplus"], "unexpected extra argument"),
        (["show"], "missing argument 'RUN'"),
        (["toy", "--config", "no.toml"], "no config file no.toml"),
        (["toy", "--config", "."], ". is a folder, not a TOML file"),
        (["toy", "--seeds", "0-a", "--dry-run"], "error: --seeds: "),
        (["toy", "--seeds", "0-1", "--fresh", "--dry-run"], "--fresh does nothing with --seeds"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(command: Command, arguments: list[str], message: str) -> None:
    said = command(*arguments)
    assert said.code == 2
    assert message in said.error
    assert said.out == ""
    assert not list(Path().iterdir())


def test_the_short_names_of_run_options(command: Command, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("steps = 2")
    said = command("toy", "-c", "p.toml", "-o", "here", "-s", 3, "-q", "--json")
    assert said.document["run_dir"].endswith("here")
    assert "seed = 3" in Path("here/config.toml").read_text()

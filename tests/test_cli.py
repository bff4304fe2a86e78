"""The command line itself: names, help, errors of usage, quiet runs."""

import logging
import os

import pytest
import typer

from percepiano_ast import __version__, cli

PROGRAM = typer.main.get_command(cli.app)
COMMANDS = PROGRAM.commands


def test_help_groups_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(group in shown for group in (cli.RATE, cli.TRAIN, cli.EVALUATE, cli.RUNS))
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_parses(name, capsys):
    """Each option has a text, and the example is a call of this command."""
    assert cli.main([name, "--help"]) == 0
    assert "Example: percepiano" in " ".join(capsys.readouterr().out.split())
    command = COMMANDS[name]
    assert all(param.help for param in command.params if param.name != "files")
    program, called, *words = command.epilog.removeprefix("Example: ").split()
    given = cli.current_names([called, *words], PROGRAM)[1:]
    assert (program, called) == ("percepiano", name) and command.make_context(name, given)


@pytest.mark.parametrize(
    "old, new",
    [
        (
            "judge --protocol content performer --curve --out x",
            "regress --protocol content --protocol performer --learning-curve --out x",
        ),
        (
            "listen --other-synthesizers --clips 3",
            "sensitivity --other-synthesizers none --clips 3",
        ),
        ("switches --trained", "ablate --strategies all"),
        ("switches --trained last lora", "ablate --strategies last --strategies lora"),
        ("baseline --synthesizers a b", "baselines --synthesizers a --synthesizers b"),
        (
            "preprocess --renderings D --one-loudness --max-bad=2 --limit-hours 3 --stored f",
            "preprocess --recordings D --normalize-loudness --max-errors=2 --max-hours 3 --dtype f",
        ),
        (
            "pretrain --dry-run --accumulate 2 --shard-params",
            "pretrain --accum-steps 2 --fsdp --check-memory v5e-1",
        ),
        (
            "pretrain --dry-run --target v5e-1 v3-8",
            "pretrain --check-memory v5e-1 --check-memory v3-8",
        ),
        ("convert a --to b", "convert a --output b"),
        ("pretrain --out=", "pretrain --out="),
        ("rate take.wav --quiet", "--quiet rate take.wav"),
        ("evaluate a.csv b.csv --out x", "evaluate a.csv b.csv --out x"),
    ],
)
def test_names_of_the_release_before_still_work(old, new):
    given = cli.current_names(old.split(), PROGRAM)
    assert given == new.split()
    name, *words = [word for word in given if word != "--quiet"]
    for param in COMMANDS[name].params:
        if param.required and param.opts[0].startswith("--") and param.opts[0] not in words:
            words += [param.opts[0], "X"]
    COMMANDS[name].make_context(name, words)  # parses


def test_an_empty_value_is_one():
    assert cli.current_names(["pretrain", "--store", "", "--epochs", "2"], PROGRAM) == [
        *("pretrain", "--store", "", "--epochs", "2")
    ]


def test_an_old_command_says_its_new_name(tmp_path, capsys):
    assert cli.main(["judge", "--out", str(tmp_path)]) == 2
    assert "judge is now called regress" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["fly"], "No such command 'fly'"),
        (["status", "--nothing"], "--nothing"),
        (["rate"], "FILE..."),
        (["pretrain", "--epochs", "many"], "'many' is not a valid int"),
    ],
)
def test_wrong_usage_is_one_line(arguments, words, capsys):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ") and words in line and "--help" in line and not shown.out


def test_an_error_is_one_line_whatever_the_name(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9\n\x1b[31m")
    for arguments in (
        ["preprocess", "--out", str(tmp_path / "out"), "--source", str(tmp_path / name)],
        ["preprocess", "--out", str(tmp_path / name)],
        ["rate", str(tmp_path / "none" / name)],
        ["rate", "--score", name, "take.wav"],
        ["status", "--out", str(tmp_path / "none" / name)],
        ["explain", name, "--run", name, "--dimension", "x", "--out", name],
    ):
        assert cli.main(arguments) == 2
        shown = capsys.readouterr()
        assert len(shown.err.splitlines()) == 1 and not shown.out, arguments


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"percepiano {__version__}\n"


def test_quiet_prints_warnings_but_no_progress(tmp_path, capsys):
    for quiet, shown in ((["--quiet"], "careful\n"), ([], "step 1\ncareful\n")):
        assert cli.main([*quiet, "status", "--out", str(tmp_path)]) == 2
        capsys.readouterr()
        logger = logging.getLogger("percepiano_ast.training")
        logger.info("step 1")
        logger.warning("careful")
        assert capsys.readouterr().out == shown

"""The command line: help, usage errors, exit codes, JSON; tests/test_main_job.py runs the whole way through it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import typer

from medseg import __version__
from medseg.cli import app, main
from medseg.errors import CasesFailed, DataError, MedsegError, ResourceError, collect


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    code = ended.value.code
    return (0 if code is None else int(code)), captured.out, captured.err


def every_command() -> list[tuple[str, ...]]:
    group = typer.main.get_command(app)
    found = []
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found += [(name, part) for part in inner] if inner else [(name,)]
    return found


@pytest.mark.parametrize("command", every_command(), ids=" ".join)
def test_every_command_has_help_with_examples(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert "Examples:" in out
    assert f"medseg {' '.join(command)}" in out


@pytest.mark.parametrize("names", every_command(), ids=" ".join)
def test_examples_in_the_help_are_read_as_they_stand(names):
    command = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]
    examples = [line.split() for line in command.epilog.splitlines() if line.startswith("  medseg ")]
    assert examples
    for words in examples:
        assert tuple(words[1 : 1 + len(names)]) == names
        command.make_context(None, words[1 + len(names) :])  # reads options and arguments, runs nothing


def test_the_help_of_all_tells_the_exit_codes(capsys):
    assert "Exit codes: 0 done, 1 bug, 2 usage" in run(capsys, "--help")[1]


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"medseg {__version__}\n", "")


def test_python_dash_m_is_the_same_program():
    result = subprocess.run([sys.executable, "-m", "medseg", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"medseg {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fly"], "fly"),
        (["train", "livr", "--data", "."], "liver"),
        (["pipelines", "show", "livr"], "liver"),
        (["data", "info", "dirve"], "drive"),
        (["data", "phantom", "kidney", "-o", "x"], "liver, drive, cell"),
        (["train"], "medseg train NAME"),
        (["networks", "show", "UNett"], "UNet"),
        (["networks", "show", "UNet", "--input", "12,a"], "--input"),
        (["networks", "show", "UNet", "--input", "-5,0"], "above 0"),
        (["export", "nowhere", "--format", "pdf"], "package, bundle, onnx"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_usage_errors_end_with_2_and_tell_what_is_right(capsys, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert told in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data", "add", "mine"], "the data folder is not given"),
        (["data", "add", "mine", "--data", "no such folder"], "no such data folder"),
        (["data", "add", "mine", "--data", "."], "give one of --images, --folder, --csv"),
        (["data", "check", "liver"], "the data folder is not given"),
        (["data", "fetch", "liver"], "the data folder is not given"),
        (["train", "liver"], "the data folder is not given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_cheap_to_check_is_told_before_anything_heavy_is_loaded(tmp_path, arguments, told):
    code = (
        "import sys, medseg.cli as c\n"
        f"try: c.main({arguments})\n"
        "except SystemExit as ended: print(ended.code, sorted({'torch', 'monai', 'scipy'} & sys.modules.keys()))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "MEDSEG_DATA"}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert ended.stdout == "2 []\n"
    assert told in ended.stderr


def test_an_error_is_json_when_json_was_asked_for(capsys):
    code, out, err = run(capsys, "data", "info", "dirve", "--json")
    assert code == 2
    value = json.loads(out)
    assert value["exit_code"] == 2
    assert value["error"][0]["code"].startswith("E1")
    assert "drive" in err


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (DataError("bad voxel", case="c1", file="a b.nii.gz"), 3, "file: a b.nii.gz"),
        (collect([DataError("one"), ResourceError("two")]), 5, "2 problems found"),
        (CasesFailed("some"), 4, "some"),
        (MedsegError("odd"), 1, "odd"),
        (KeyError("surprise"), 1, "bug in medseg"),
        (OSError(28, "No space left on device"), 5, "No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_exit_codes(capsys, monkeypatch, raised, code, told):
    import medseg.doctor

    def fail():
        raise raised

    monkeypatch.setattr(medseg.doctor, "describe_machine", fail)
    found, _, err = run(capsys, "doctor")
    assert found == code
    assert told in err
    assert "Traceback" not in err
    if code < 128:
        found, out, err = run(capsys, "doctor", "--json")
        value = json.loads(out)
        assert (found, value["exit_code"]) == (code, code)
        assert (value["error"][0]["code"] in err, told in err) == (True, True)


def test_debug_shows_the_traceback(monkeypatch):
    import medseg.doctor

    def fail():
        raise DataError("bad")

    monkeypatch.setattr(medseg.doctor, "describe_machine", fail)
    with pytest.raises(DataError):
        main(["--debug", "doctor"])


def test_pipelines_list_show_copy_check(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "pipelines", "list", "--json")
    assert code == 0
    assert {"liver", "liver_attention", "hippocampus", "drive", "cell"} <= {row["name"] for row in json.loads(out)}
    code, out, _ = run(capsys, "pipelines", "copy", "liver", "mine.yaml")
    assert code == 0
    assert (tmp_path / "mine.yaml").read_text().startswith("#")
    assert run(capsys, "pipelines", "copy", "drive", "mine.yaml")[0] == 2, "nothing is overwritten"
    assert run(capsys, "pipelines", "copy", "drive", "new/folder/mine.yaml")[0] == 0
    code, _, err = run(capsys, "pipelines", "copy", "drive", "mine.yaml/other.yaml")
    assert (code, "E502" in err) == (5, True)
    assert run(capsys, "pipelines", "check", "mine.yaml")[0] == 0
    (tmp_path / "mine.yaml").write_text((tmp_path / "mine.yaml").read_text() + "\nnetwrok: UNet\n")
    code, _, err = run(capsys, "pipelines", "check", "mine.yaml")
    assert code == 2
    assert "network" in err


def test_every_pipeline_that_ships_is_sound(capsys):
    assert run(capsys, "pipelines", "check")[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp, which can tell its settings, is Linux's")
@pytest.mark.parametrize(("chosen", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_user_chose_otherwise(chosen, policy):
    # OpenMP itself tells what it read when torch was loaded
    code = "import medseg.cli, torch"
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_DISPLAY_ENV": "true", **chosen}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{policy}'" in ended.stderr


def test_doctor_passes_its_own_test(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    facts = json.loads(out)
    assert [check for check in facts["self_test"] if not check["passed"]] == []
    assert code == 0
    assert facts["threads"]["cores"] >= 1


def test_a_tilde_that_the_shell_leaves_is_the_home_folder(tmp_path, monkeypatch, capsys):
    """bash does not expand `--data=~/images`; a folder called ~ would be made, and removed with `rm -rf ~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for written in ("--data=~/images", "--data=~"):
        with pytest.raises(SystemExit) as ended:
            main(["data", "list", written])
        assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["data", "list", "--data", "~/none"])
    assert ended.value.code == 2
    assert f"file: {tmp_path}/none" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(("number", "word"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("predict", "run", "a.nii.gz", "-o", "masks"), "masks that are complete stay in masks; the same command with"),
        (("evaluate", "masks", "labels"), "run the same command again"),
    ],
    ids=["predict", "evaluate"],
)
def test_a_signal_ends_a_command_with_what_is_kept(capsys, monkeypatch, arguments, told, number, word):
    ended = []

    def work(*_, **__):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            ended.append("in order")

    monkeypatch.setattr("medseg.prediction.predict", work)
    monkeypatch.setattr("medseg.evaluation.evaluate", work)
    before = signal.getsignal(signal.SIGTERM)
    # what a shell starts in the background ignores Ctrl-C
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, out, said = run(capsys, *arguments)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert (code, out, ended) == (128 + number, "", ["in order"])
    assert said.splitlines()[-1] == f"medseg: {word}"
    assert told in said
    assert signal.getsignal(signal.SIGTERM) == before

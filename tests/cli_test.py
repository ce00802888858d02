import subprocess
import sys
import types

import pytest

from attnjax import cli


@pytest.mark.parametrize(
    "code", ["import attnjax", "from attnjax import cli; cli.main(['--help'])"]
)
def test_help_and_package_do_not_import_jax(code):
    check = f"import atexit, sys; atexit.register(lambda: print('jax' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    "argv, nearest",
    [
        (["shwo", "gqa"], "show"),
        (["list", "--family", "task"], "tasks"),
        (["list", "--claim", "CASUAL"], "causal"),
        (["show", "mqra"], "mqar"),
        (["papers", "--json", "--markdown"], "--markdown"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_nearest_choice(argv, nearest, capsys):
    assert cli.main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("attnjax: ") and nearest in line


def test_unknown_option_exits_with_2_and_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["list", "--famly", "tasks"])
    assert exit.value.code == 2
    assert "--family" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "benchmark", "compare"])
def test_experiments_get_their_arguments_untouched(command, monkeypatch):
    experiment = types.SimpleNamespace(main=lambda argv: argv == ["copy", "--help", "--steps=3"])
    monkeypatch.setitem(sys.modules, f"experiments.{command}", experiment)
    assert cli.main([command, "copy", "--help", "--steps=3"]) is True


def test_a_missing_dependency_of_an_experiment_names_the_extra(monkeypatch, capsys):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'grain'", name="grain")

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    assert cli.main(["train"]) == 2
    assert "attnjax[experiments]" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["papers", "--json"], ["list"]])
def test_a_reader_that_stops_early_is_no_error(command):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", "attnjax.cli", *command], **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""

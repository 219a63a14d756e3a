"""Tests of docs/SWEEPS.md: its commands parse, and what it chooses has the best validation figure."""

import json
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.shared import REPO
from tests.test_docs import wrong_call

PAGE = (REPO / "docs/SWEEPS.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
HISTORY = [{"val_auroc": 0.5}, {"val_auroc": 0.75}, {"val_auroc": 0.625}]  # the second epoch is kept


def write_run(folder, shift=0.0, **changes):
    """results.json of three epochs whose best has val_auroc 0.75 + shift."""
    history = [{"val_auroc": row["val_auroc"] + shift} for row in HISTORY]
    folder.mkdir(parents=True)
    results = {"history": history, "best_epoch": 2, "finished": True, **changes}
    (folder / "results.json").write_text(json.dumps(results))


def test_shell_loop_chooses_by_validation(tmp_path):
    """Its last command, on runs that are there: the best one comes last, unfinished ones do not count."""
    for number, shift in enumerate((0.1, 0.2, 0.0)):
        write_run(tmp_path / "outputs/sweep" / str(number), shift)
    write_run(tmp_path / "outputs/sweep/cut-off", 0.25, finished=False)
    code = re.search(r"<<'END'\n(.*?)^END", BLOCKS["bash"], re.MULTILINE | re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    folders = re.findall(r"\((0\.\d+), 'outputs/sweep/(.*?)/results.json'\)", done.stdout)
    assert [(round(float(auroc), 6), name) for auroc, name in folders] == [
        (0.75, "2"),
        (0.85, "0"),
        (0.95, "1"),
    ]


def test_optuna_example(tmp_path, monkeypatch):
    """With a study of one trial in Optuna's place, and a training that writes results.json."""
    called, told = [], []

    def run(command, check):
        called.append(command)
        write_run(tmp_path / command[command.index("--out") + 1])

    class Study:
        best_trial, best_value, best_params = SimpleNamespace(number=4), 0.75, {}

        def optimize(self, objective, n_trials):
            trial = SimpleNamespace(number=4)
            trial.suggest_float = lambda name, low, high, log=False: high
            trial.suggest_categorical = lambda name, choices: choices[-1]
            told.append(objective(trial))

    optuna = ModuleType("optuna")
    optuna.create_study = lambda direction, **place: told.append(direction) or Study()
    monkeypatch.setitem(sys.modules, "optuna", optuna)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS["python"], "sweep.py", "exec"), {"__name__": "__main__"})
    assert told == ["maximize", 0.75]
    (command,) = called
    assert wrong_call(command[1], command[2:]) is None


def test_wandb_sweep_file():
    """Its parameters are flags, with values that they take; --track logs the figure."""
    yaml = pytest.importorskip("yaml")
    sweep = yaml.safe_load(BLOCKS["yaml"])
    assert sweep["metric"] == {"name": "best_val_auroc", "goal": "maximize"}
    shell, option, line, _, macro = sweep["command"]
    assert (shell, option, macro) == ("sh", "-c", "${args}")
    words = line.replace('"$@"', "").split()
    assert words[:2] == ["python", sweep["program"]] and words[-1] == "outputs/sweep-$WANDB_RUN_ID"
    assert words[words.index("--track") + 1] == "wandb"
    for name, values in sweep["parameters"].items():
        for value in values.get("values") or (values["min"], values["max"]):
            assert wrong_call(words[1], [*words[2:], f"--{name}={value}"]) is None

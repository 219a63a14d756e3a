"""Does this version say of old run folders what an older one says, and does it train the same weights?

    python studies/pins.py --old ../today --new . --out /tmp/pins
    python studies/pins.py --old ../today --new . --out /tmp/pins --only scratch monitor --keep

Draws small images and trains a run of every kind with the OLD checkout, about 30 steps each. OLD and NEW
each calibrate, score, explain, watch and tabulate copies of these runs. Then NEW trains the same runs from
the same seed. Only command lines are used, so the modules of a checkout may lie anywhere.

Prints one markdown table:

- a row a kind: every number and text in its JSON, CSV and NPZ files, the pixels of its pictures, and what
  predict.py, monitor.py and compare.py printed. A kind that used an option which NEW has deleted may be
  refused instead: exit code 2 and one line on stderr that names a version;
- a row "30 steps" a kind: every tensor of checkpoint.pth, bit for bit, and the history.

Below it, unless --only is given, come the options that only one side has. Exit code 1 if anything differs.
What OLD made stays in OUT/old and is used again while OLD's commit and the commands are the same; remove OUT
after a change of drawn.py. OUT/new-NAME, by the name of the checkout, is removed at the end, unless --keep is
given; so several checkouts may be compared at a time. Both sides must run on the same processor.

Two processes at a time, one thread each; about 130 processes, half of them OLD's. That is about 16 minutes of
processor time on cores without AVX512-BF16: 8 minutes on two free ones, and half of it where OLD's part is
there. On two cores that ten other jobs shared it took 68 minutes.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from studies.drawn import draw
from studies.kinds import KINDS, needed, with_needs
from studies.leaves import compared, flat, of_checkpoint, of_folder, of_table

SCRIPTS = (
    "train_scratch train_pretrained train_cnn train_hybrid train_linear pretrain_mae train_lungs calibrate "
    "compare predict explain monitor"
).split()


# ---------------------------------------------------------------- commands


class Side(NamedTuple):
    """A checkout, and the folder that its commands are called in.

    The folder holds trained/, runs/ (copies of these, to work on) and done/ (what was printed)."""

    checkout: Path
    folder: Path


def slug(name):
    """The name of a kind's folder."""
    return re.sub(r"\W+", "-", name).strip("-")


def identity(checkout):
    """The commit of a checkout, with a mark if it was changed since; its path where git knows none."""
    git = ["git", "-C", str(checkout)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return str(checkout)
    changed = subprocess.run([*git, "diff", "HEAD"], capture_output=True).stdout
    return f"{found.stdout.strip()} {hashlib.sha256(changed).hexdigest()[:8] if changed else ''}".strip()


def call(side, record, words):
    """Carry out SCRIPT FLAG... of this side -> {words, code, out, err}, kept in done/RECORD.json."""
    script, *flags = words
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    argv = [sys.executable, str(side.checkout / f"{script}.py"), *flags]
    done = subprocess.run(argv, cwd=side.folder, env=environment, capture_output=True, text=True)
    found = {"words": words, "code": done.returncode, "out": done.stdout, "err": done.stderr}
    path = side.folder / "done" / f"{record}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1))
    return found


def write_log(side, name, printed):
    """Make a log for monitor.py of what predict.py printed -> its path from the side's folder.

    The folder of each image tells its diagnosis."""
    rows = list(csv.DictReader(io.StringIO(printed)))
    path = Path("logs", f"{slug(name)}.csv")
    (side.folder / "logs").mkdir(exist_ok=True)
    with open(side.folder / path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "diagnosis"])
        writer.writeheader()
        writer.writerows({**row, "diagnosis": Path(row["path"]).parent.name} for row in rows)
    return str(path)


def carry_out(side, name, old, version):
    """Train a kind, copy what OLD trained, and do with the copy what the kind asks.

    version: OLD's, if this side is OLD. There, a command that fails ends the study."""
    kind, place, printed = KINDS[name], slug(name), ""
    print(f"{side.folder.name}: {name}", file=sys.stderr, flush=True)
    for part in ("trained", "runs", "done"):
        shutil.rmtree(side.folder / part / place, ignore_errors=True)
    todo = [(f"{place}/{i}", command) for i, command in enumerate(kind.then, 1)]
    if kind.train and not (kind.deleted and side != old):
        todo.insert(0, (f"{place}/0", f"{kind.train} --out trained/{place}"))
    if kind.reread and side != old:
        predict = next(command for command in kind.then if command.startswith("predict"))
        command = predict.replace("--keep batch ", "").replace("{run}", f"../old/runs/{place}")
        todo.append((f"{place}/reread", command))
    for record, command in todo:
        source = old.folder / "trained" / slug(kind.copy_of or name)
        copy = side.folder / "runs" / place
        if not record.endswith("/0") and source.exists() and not copy.exists():
            shutil.copytree(source, copy)
        log = write_log(side, name, printed) if "{log}" in command and printed else "none.csv"
        words = [word.format(run=f"runs/{place}", log=log) for word in command.split()]
        found = call(side, record, words)
        if version and found["code"] not in (0, 3):  # 3: monitor.py refuted a floor
            raise SystemExit(f"OLD fails: {' '.join(words)}\n{found['err']}")
        if words[0] == "predict":
            printed = found["out"]
    if version:
        (side.folder / "done" / place / "plan").write_text(plan(name, version))


def plan(name, version):
    """What the folders of a kind depend on, as text: if it is still the same, they need not be made again."""
    kind = KINDS[name]
    return json.dumps([version, *kind, *(plan(need, version) for need in needed(name))])


def make(side, names, old, version=None):
    """`carry_out` for these kinds, two at a time, first those that need no other one.

    version: OLD's, if this side is OLD. What it has made already is kept."""
    for wave in (False, True):
        todo = [name for name in names if bool(needed(name)) == wave]
        if version:
            todo = [name for name in todo if not is_made(side, name, version)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: carry_out(side, name, old, version), todo))


def is_made(side, name, version):
    """Whether this side has finished a kind in an earlier call."""
    path = side.folder / "done" / slug(name) / "plan"
    return path.exists() and path.read_text() == plan(name, version)


# ---------------------------------------------------------------- what is compared


def of_record(found, name):
    """The leaves of a carried out command: its exit code, the last line of an error, what it printed."""
    leaves, script = {f"{name} exit code": found["code"]}, found["words"][0]
    if found["code"] not in (0, 3):
        leaves[f"{name} error"] = found["err"].strip().rpartition("\n")[2]
    if script == "predict":
        leaves |= of_table(found["out"], f"{name} printed")
    if script in ("monitor", "compare"):
        leaves |= {f"{name} line {i}": line for i, line in enumerate(found["out"].splitlines(), 1)}
    return leaves


def records(side, name):
    """{its place in the chain: a carried out command} of a kind."""
    paths = sorted((side.folder / "done" / slug(name)).glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def of_kind(side, name):
    """The leaves of all that was done with the copy of a run."""
    leaves, commands = of_folder(side.folder / "runs" / slug(name)), records(side, name)
    commands.pop("0", None)
    made = side.folder / "runs" / slug(name) / "checkpoint.pth"
    if not (KINDS[name].train or KINDS[name].copy_of) and made.exists():  # not a copy: an ensemble's
        leaves |= of_checkpoint(made)
    if KINDS[name].reread and "reread" not in commands:  # OLD: what it printed itself
        commands["reread"] = next(found for found in commands.values() if found["words"][0] == "predict")
    for place, found in commands.items():
        step = f"{place} {found['words'][0]}.py"
        leaves |= of_record(found, step.replace("reread", "OLD's calibration,"))
    return leaves


def of_training(side, name):
    """The leaves of a trained run: every tensor of its checkpoint, the history and what was chosen by it."""
    folder = side.folder / "trained" / slug(name)
    if not (folder / "results.json").exists():
        return {"trained": False}
    results = json.loads((folder / "results.json").read_text())
    kept = {key: results.get(key) for key in ("history", "best_epoch", "split", "mean", "std", "finished")}
    return {"trained": True, **flat(kept, "results.json"), **of_checkpoint(folder / "checkpoint.pth")}


def refusal(side, name):
    """How NEW declines folders that used a deleted option.

    "refused: ..." where every command ended with exit code 2 and one line on stderr that names a version;
    None if a command went well; otherwise what is wrong with the refusal."""
    wrong, said = [], ""
    for place, found in records(side, name).items():
        if found["code"] == 0:
            return None
        lines = found["err"].strip().splitlines()
        if found["code"] != 2 or len(lines) != 1 or "Traceback" in found["err"]:
            step = f"{place} {found['words'][0]}.py"
            wrong.append(f"{step}: exit code {found['code']}, {len(lines)} lines on stderr")
        said = lines[-1] if lines else ""
    if not wrong and not re.search(r"version|commit|\b[0-9a-f]{7,40}\b", said):
        wrong.append(f"names no version: {said}")
    return wrong[0] if wrong else f"refused: {said}"


def help_of(side, script):
    """What a script prints of its flags: of all, where --help leaves some to --help-all."""
    done = call(side, f"help/{script}", [script, "--help-all"])
    if done["code"] != 0:
        done = call(side, f"help/{script}", [script, "--help"])
    return done


def options(side, version=None):
    """{SCRIPT.py --flag, or SCRIPT.py --flag value for those of a list} of all scripts, from their --help.

    version: OLD's, if this side is OLD. What it has said already is not asked again."""
    marker = side.folder / "done/help/version"
    if version and marker.exists() and marker.read_text() == version:
        found = [json.loads((marker.parent / f"{script}.json").read_text()) for script in SCRIPTS]
    else:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda script: help_of(side, script), SCRIPTS))
        marker.write_text(str(version))
    names = set()
    for script, done in zip(SCRIPTS, found):
        text = re.sub(r"\s+", " ", done["out"])
        names |= {f"{script}.py {flag}" for flag in re.findall(r"^  (--[\w-]+)", done["out"], re.MULTILINE)}
        for flag, choices in re.findall(r"(--[\w-]+) \{([^}]*)\}", text):
            names |= {f"{script}.py {flag} {choice}" for choice in choices.split(",")}
    return names


def report(side, place, runs, where="", keep=False):
    """The leaves of compare.py on these runs, which lie in the folder `where`, seen from this side's.

    place: folder of what it writes. keep: what it has written there before is taken again."""
    folder, record = side.folder / place, side.folder / "done" / f"{place}.json"
    if not (keep and record.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        words = f"compare --figures {place}/figures --csv {place}/report.csv --run".split()
        call(side, place, words + [where + run for run in runs])
    return of_record(json.loads(record.read_text()), "compare.py") | of_folder(folder)


# ---------------------------------------------------------------- the table


def what(name):
    """What was done with a kind, in words."""
    steps = [command.split()[0] for command in KINDS[name].then]
    return ", ".join([*steps, *(["predict on OLD's calibration"] if KINDS[name].reread else [])])


def rows(old, new, names):
    """[(kind, compared, values, largest difference, result)]"""
    for name in names:
        if not KINDS[name].then:
            continue
        said = refusal(new, name) if KINDS[name].deleted else None
        if said:
            yield name, what(name), 0, 0.0, said
        else:
            yield name, what(name), *compared(of_kind(old, name), of_kind(new, name))
    kinds = {name: KINDS[name] for name in names}
    runs = [f"runs/{slug(n)}" for n, k in kinds.items() if k.then and not k.copy_of and not k.deleted]
    if runs:
        depends = repr([plan(name, identity(old.checkout)) for name in names])
        place = f"reports/{hashlib.sha256(depends.encode()).hexdigest()[:8]}"
        reported = report(old, place, runs, keep=True)
        yield "all", "compare", *compared(reported, report(new, place, runs))
        again = report(new, place, runs, where="../old/")
        yield "all", "compare on OLD's calibrations", *compared(reported, again)
    for name in names:
        if KINDS[name].train and not KINDS[name].deleted:
            leaves = of_training(old, name), of_training(new, name)
            yield f"30 steps: {name}", "checkpoint.pth, history", *compared(*leaves)


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", required=True, type=Path, metavar="CHECKOUT", help="makes the run folders")
    parser.add_argument(
        "--new", required=True, type=Path, metavar="CHECKOUT", help="must say the same of them"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where everything is made")
    parser.add_argument("--only", nargs="+", choices=tuple(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--keep", action="store_true", help="keep FOLDER/new-NAME")
    args = parser.parse_args()
    for flag in ("old", "new"):
        if not (getattr(args, flag) / "calibrate.py").exists():
            parser.error(f"--{flag} {getattr(args, flag)} holds no calibrate.py: name a checkout")
    return args


def main():
    args, began = parse(), time.time()
    names = with_needs(args.only)
    old = Side(args.old.resolve(), args.out / "old")
    new = Side(args.new.resolve(), args.out / f"new-{args.new.resolve().name}")
    shutil.rmtree(new.folder, ignore_errors=True)
    for side in (old, new):
        side.folder.mkdir(parents=True, exist_ok=True)
    draw(args.out / "images")
    make(old, names, old, version=identity(old.checkout))
    make(new, names, old)
    print(f"OLD {identity(old.checkout)}, NEW {identity(new.checkout)}\n")
    print("| kind | compared | values | largest difference | result |\n| --- | --- | --- | --- | --- |")
    failed = False
    for kind, steps, values, largest, result in rows(old, new, names):
        failed |= result != "same" and not result.startswith("refused: ")
        print(f"| {kind} | {steps} | {values:,} | {largest:.3g} | {result} |", flush=True)
    if names == list(KINDS):  # two dozen processes, and the same answer for every kind
        before, after = options(old, identity(old.checkout)), options(new)
        print(f"\nNo longer options: {', '.join(sorted(before - after)) or 'none'}")
        print(f"New options: {', '.join(sorted(after - before)) or 'none'}")
    print(f"{(time.time() - began) / 60:.1f} minutes", file=sys.stderr)
    if not args.keep:
        shutil.rmtree(new.folder)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()

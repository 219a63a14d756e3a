"""The rows of benchmark.py of two versions of this project, in turns: CPU seconds, one thread.

    python studies/turns.py --old ../old --data-dir Data/chest_xray

Other programs on a machine change the clock of a benchmark by more than 5%. So both versions stay loaded and
do the same small work by turns, old first in every second turn, and CPU seconds are compared. Prints for each
row the medians, and the median, least and greatest ratio new / old. --old: a checkout with
studies/workload.py, or with workload.py at its root.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
WORKER = "--worker"  # how this file starts itself, once a version


def work_of(data_dir, work):
    """{row: a function that does its work once}, by the modules of the version that sys.path names."""
    import numpy as np
    import torch

    try:
        from studies import workload
        from training.evaluate import predict
    except ImportError:  # before the modules moved into folders
        import workload
        from engine import predict

    torch.set_num_threads(1)
    args = Namespace(images=64, img_size=224, device=torch.device("cpu"), amp=False, workers=0)
    train = Path(data_dir, "train")
    places = {"": train, "_originals": workload.enlarge(train, work / "large", 8)}
    rows = {}
    for name, folder in places.items():
        count = len(workload.image_folder(folder))
        chosen = np.resize(np.random.default_rng(0).permutation(count), args.images)
        ours = workload.Ours(folder, chosen, args, work / f"cache{name}")
        subset, model = ours.load(), ours.model("scratch")
        rows[f"decode{name}"] = partial(ours.load, fresh=True)
        rows[f"epoch{name}"] = partial(ours.epoch, model, subset)
        if not name:
            rows["evaluate"] = partial(predict, model, subset, ours.inputs)
            rows["frozen"] = partial(ours.head, ours.model("ti16"), subset)
            for size, times in (("scratch", 4), ("ti16", 4), ("b16", 1)):
                rows[f"step_{size}"] = partial(repeated, ours.stepper(ours.model(size), subset, 4), times)
    return rows


def repeated(function, times):
    for _ in range(times):
        function()


def worker(root, data_dir):
    """Do the row that each line of standard input names; answer with its CPU seconds."""
    sys.path[0] = root
    os.chdir(root)
    with tempfile.TemporaryDirectory() as work:
        rows = work_of(data_dir, Path(work))
        print(" ".join(rows), flush=True)
        for line in sys.stdin:
            before = os.times()
            rows[line.strip()]()
            after = os.times()
            print(f"seconds {sum(after[:4]) - sum(before[:4])}", flush=True)


def started(root, data_dir):
    """(process of a version, its rows). InputError if it cannot start."""
    from common.console import InputError

    command = [sys.executable, __file__, WORKER, str(root), str(data_dir)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    rows = process.stdout.readline().split()
    if not rows:
        raise InputError(f"{root} could not be started, see above: it needs this project's modules")
    return process, rows


def asked(process, row):
    """CPU seconds of a row; what the work itself prints is passed over."""
    process.stdin.write(row + "\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("seconds "):
            return float(line.split()[1])
    raise RuntimeError(f"the process of {row} has ended")


def main():
    from common.cli import COUNT, Parser
    from common.console import say
    from layouts.folders import find_root

    parser = Parser(__doc__)
    parser.add_argument("--old", required=True, metavar="DIR", help="checkout of the other version")
    parser.add_argument("--data-dir", default="Data/chest_xray", metavar="DIR", help="folder with train/")
    parser.add_argument("--turns", type=COUNT, default=8, metavar="N", help="turns after one that warms up")
    args = parser.parse_args()
    data_dir = find_root(args.data_dir).resolve()
    versions = {"old": started(Path(args.old).resolve(), data_dir), "new": started(REPO, data_dir)}
    rows = versions["new"][1]
    seconds = {row: {name: [] for name in versions} for row in rows}
    for turn in range(args.turns + 1):
        for row in rows:
            for name in sorted(versions, reverse=turn % 2 == 1):
                taken = asked(versions[name][0], row)
                if turn:  # the first one warms up
                    seconds[row][name].append(taken)
        say(f"turn {turn} of {args.turns}")

    print("| row | old, s | new, s | new / old | least to greatest |\n| --- | ---: | ---: | ---: | ---: |")
    for row, taken in seconds.items():
        old, new = statistics.median(taken["old"]), statistics.median(taken["new"])
        ratios = [b / a for a, b in zip(taken["old"], taken["new"])]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {row} | {old:.2f} | {new:.2f} | {statistics.median(ratios):.2f} | {spread} |")
    for process, _ in versions.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        worker(*sys.argv[2:])
    else:
        sys.path.insert(0, str(REPO))
        from common.console import start

        start(main)

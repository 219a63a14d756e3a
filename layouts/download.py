"""The download of a set from Kaggle, with the steps by hand where it does not get through."""

import re
import shutil
import subprocess
from pathlib import Path

from common.console import InputError
from layouts.folders import find_root

KAGGLE = "paultimothymooney/chest-xray-pneumonia"


def download(data_dir, name=KAGGLE):
    """Fetch the Kaggle set OWNER/NAME into `data_dir`: kagglehub, then the kaggle command; InputError with
    the steps by hand if neither gets through. Both read the account from the environment or kaggle.json.
    Nothing is done when `data_dir` already has a train/ folder or a table.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"--download {name}: a Kaggle set is named OWNER/NAME, such as {KAGGLE}")
    target, tries = Path(data_dir), []
    if any(target.glob("*.csv")) or any(target.glob("train")) or root_or_all(target) != target:
        return
    try:
        import kagglehub

        source = Path(kagglehub.dataset_download(name))
        # Some sets hold themselves a second time, and all of it would be copied.
        shutil.copytree(root_or_all(source), target, dirs_exist_ok=True)
        return
    except ImportError:
        tries.append("kagglehub is not installed (pip install kagglehub)")
    except Exception as error:  # no network, no account, no such set, each with errors of its own: next way
        tries.append(f"kagglehub: {' '.join(str(error).split())[:200]}")
    if shutil.which("kaggle"):
        done = subprocess.run(
            ["kaggle", "datasets", "download", "-d", name, "-p", str(target), "--unzip"],
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return
        tries.append(f"kaggle: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    else:
        tries.append("the kaggle command is not installed (pip install kaggle)")
    raise InputError(
        "the download did not get through: " + "; ".join(tries) + ". By hand:\n"
        f"  1. open https://www.kaggle.com/datasets/{name} in a browser and download the zip\n"
        f"  2. unzip it so that {target}/train and {target}/test hold the class folders, or, for a table of\n"
        f"     findings, {target}/images and the CSV file\n"
        "  3. run the same command again without --download"
    )


def root_or_all(folder):
    """The folder inside a download that holds train/, or all of it if there is none (or several)."""
    try:
        return find_root(folder)
    except InputError:
        return folder

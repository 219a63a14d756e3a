"""Tests of --download, without a network: Kaggle and its tools are played by fakes."""

import io
import json
import os
import shutil
import sys
import urllib.error
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from common.console import InputError
from layouts import download, download_account
from tests.shared import touch

SET = "someone/lungs"
SECRET = "s3cret-t0ken"


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A home without an account, no tool, and a Kaggle whose set has 3,210,000,000 bytes."""
    names = ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR", "XDG_CONFIG_HOME")
    for name in (*names, "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    (home / ".kaggle").mkdir(parents=True)
    monkeypatch.setattr(download_account.Path, "home", lambda: home)
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(json.dumps({"totalBytes": 3_210_000_000}).encode())

    monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)
    return SimpleNamespace(home=home / ".kaggle", asked=asked, target=tmp_path / "data/lungs")


def hub(monkeypatch, fetch, account=None):
    """A kagglehub whose dataset_download is `fetch`."""
    module = ModuleType("kagglehub")
    module.__spec__ = ModuleSpec("kagglehub", None)
    module.dataset_download = fetch
    module.config = SimpleNamespace(get_kaggle_credentials=lambda: account)
    monkeypatch.setitem(sys.modules, "kagglehub", module)


class Refused(Exception):
    """As kagglehub's KaggleApiHTTPError: it holds the answer."""

    def __init__(self, status):
        super().__init__(f"{status} Client Error. Resource at URL: https://www.kaggle.com/x")
        self.response = SimpleNamespace(status_code=status)


def message(kaggle):
    with pytest.raises(InputError) as error:
        download.download(kaggle.target, SET)
    assert SECRET not in str(error.value) and "By hand:" in str(error.value)
    return str(error.value)


def raises(error):
    def fetch(name):
        raise error

    return fetch


@pytest.mark.parametrize(
    "fault, words",
    [
        (
            Refused(401),
            ("401, the account was not accepted", "No account was found", download_account.SETTINGS),
        ),
        (Refused(403), ("403, not allowed", "No account was found")),
        (Refused(404), ("404, there is no such set", "Is the name right?", f"datasets/{SET}")),
        (Refused(429), ("429", "Wait some minutes")),
        (Refused(503), ("503, service unavailable", "Kaggle's")),
        (ConnectionRefusedError("no"), ("Kaggle did not answer", "HTTPS_PROXY")),
        (OSError("Max retries exceeded with url: /x"), ("Kaggle did not answer",)),
        (ValueError("odd"), ("kagglehub: odd",)),
    ],
)
def test_each_answer_of_kaggle_is_told_apart(kaggle, monkeypatch, fault, words):
    hub(monkeypatch, raises(fault))
    text = message(kaggle)
    for word in (*words, "kaggle: not installed (pip install kaggle)"):
        assert word in text, text
    assert not kaggle.target.exists()


def test_a_proxy_that_is_set_is_named(kaggle, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    hub(monkeypatch, raises(OSError("Max retries exceeded (Caused by ProxyError('Unable to connect'))")))
    text = message(kaggle)
    assert "does the proxy answer that https_proxy names?" in text and "set HTTPS_PROXY" not in text


@pytest.mark.parametrize("page", ["https://www.kaggle.com/datasets/{}", "kaggle.com/{}/", "{}?select=a"])
def test_the_address_of_a_page_names_its_set(kaggle, monkeypatch, page):
    asked = []

    def fetch(name):
        asked.append(name)
        raise Refused(404)

    hub(monkeypatch, fetch)
    with pytest.raises(InputError, match=f"the download of {SET} did not"):
        download.download(kaggle.target, page.format(SET))
    assert asked == [SET]


def test_an_answer_that_caused_another_error_is_found():
    try:
        try:
            raise Refused(403)
        except Refused as error:
            raise RuntimeError("later") from error
    except RuntimeError as error:
        assert download_account.status_of(error) == 403
    http = urllib.error.HTTPError("http://x", 404, "gone", None, None)
    assert download_account.status_of(http) == 404
    unreachable = urllib.error.URLError("[Errno -3] Temporary failure: Name or service not known")
    assert download_account.status_of(unreachable) == download_account.NO_ANSWER
    assert download_account.status_of(OSError(28, "No space left on device")) is None


@pytest.mark.parametrize(
    "text, status",
    [
        ("403 - Forbidden", 403),
        ("404 Client Error: Not Found for url: https://api.kaggle.com/v1/x", 404),
        ("Authentication required to call the Kaggle API.\n", 401),
        ("OSError: Could not find kaggle.json. Make sure it's located in ~/.kaggle", 401),
        ("HTTPSConnectionPool(host='www.kaggle.com', port=443): Max retries exceeded", 0),
        ("Unknown error in lung 404.png", None),
    ],
)
def test_what_the_command_prints_is_read(text, status):
    assert download_account.status_of_text(text) == status


def test_the_places_of_an_account_are_told_apart(kaggle, monkeypatch):
    """One after the other is filled, the least important first; each is then the one that is blamed."""
    hub(monkeypatch, raises(Refused(401)), account="Colab")
    text = message(kaggle)
    assert "secrets of Colab: found" in text and "the account of secrets of Colab" in text
    assert "kagglehub.login(): none in this process" in text
    # kaggle.json: damaged, incomplete, right.
    path = kaggle.home / "kaggle.json"
    for content, says in (
        ("{", "not JSON"),
        ('{"username": "a"}', "without key"),
        ("", "empty"),
        ("[]", "without"),
    ):
        path.write_text(content)
        assert f"{path}: there, but" in message(kaggle) and says in message(kaggle)
    path.write_text(json.dumps({"username": "a", "key": SECRET}))
    text = message(kaggle)
    assert f"{path}: found" in text and f"does not know the account of {path}" in text
    assert "KAGGLE_API_TOKEN: not set" in text and "secrets of Colab: not asked" in text
    # The environment: half a pair is not used.
    monkeypatch.setenv("KAGGLE_KEY", SECRET)
    assert "KAGGLE_KEY alone is set, so it is not used" in message(kaggle)
    monkeypatch.setenv("KAGGLE_USERNAME", "a")
    assert "the account of environment: KAGGLE_USERNAME and KAGGLE_KEY" in message(kaggle)
    (kaggle.home / "access_token").write_text(SECRET)
    assert f"the account of {kaggle.home / 'access_token'}" in message(kaggle)
    monkeypatch.setenv("KAGGLE_API_TOKEN", f"{SECRET}\nb")
    assert "KAGGLE_API_TOKEN: set, but with a space or a line break inside" in message(kaggle)
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    assert "the account of environment: KAGGLE_API_TOKEN" in message(kaggle)
    sys.modules["kagglehub"].config._kaggle_credentials = SECRET  # as kagglehub.login() leaves it
    assert "the account of kagglehub.login()" in message(kaggle)
    hub(monkeypatch, raises(Refused(403)))
    assert "may not read this set" in message(kaggle)


def test_kaggle_json_lies_where_the_environment_says(kaggle, monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "elsewhere"))
    touch(tmp_path, "elsewhere/kaggle.json")
    hub(monkeypatch, raises(Refused(401)))
    assert f"{tmp_path / 'elsewhere/kaggle.json'}: there, but" in message(kaggle)


def test_other_places_of_an_account(kaggle, monkeypatch, tmp_path):
    """A token in access_token.txt, beside an empty access_token; in a file that KAGGLE_API_TOKEN names; the
    folder of settings of Linux, where there is no ~/.kaggle; a file that cannot be read; no home."""
    hub(monkeypatch, raises(Refused(401)))
    (kaggle.home / "access_token").touch()
    assert f"{kaggle.home / 'access_token'}: there, but empty" in message(kaggle)
    (kaggle.home / "access_token.txt").write_text(SECRET)
    assert f"the account of {kaggle.home / 'access_token.txt'}" in message(kaggle)
    token = tmp_path / "token"
    token.touch()
    monkeypatch.setenv("KAGGLE_API_TOKEN", str(token))
    assert f"names the file {token}: there, but empty" in message(kaggle)
    token.write_text(SECRET)
    text = message(kaggle)
    assert "the account of environment: KAGGLE_API_TOKEN" in text and SECRET not in text
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    shutil.rmtree(kaggle.home)
    settings = kaggle.home.parent / ".config/kaggle"
    settings.mkdir(parents=True)
    (settings / "kaggle.json").write_text(json.dumps({"username": "a", "key": SECRET}))
    assert f"the account of {settings / 'kaggle.json'}" in message(kaggle)
    kaggle.home.touch()  # a file in the folder's place
    assert f"{kaggle.home / 'kaggle.json'}: there, but cannot be read" in message(kaggle)

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(download_account.Path, "home", nowhere)
    assert f"{Path('~/.kaggle/kaggle.json')}: not there" in message(kaggle)


def test_nothing_is_asked_of_kaggle_without_a_tool(kaggle):
    text = message(kaggle)
    assert "kagglehub: not installed" in text and "kaggle: not installed" in text and kaggle.asked == []


def test_kagglehub_fetches_a_set_and_says_how_much(kaggle, monkeypatch, tmp_path, capsys):
    """The inner of two nested copies, as in the set of Kermany; the table beside it is no image."""
    for name in ("train/A/1.jpeg", "train/B/2.PNG", "test/A/3.jpeg", "notes.txt"):
        touch(tmp_path, f"cache/chest_xray/{name}")
    hub(monkeypatch, lambda name: str(tmp_path / "cache"))
    download.download(kaggle.target, SET)
    assert kaggle.asked == [f"https://www.kaggle.com/api/v1/datasets/view/{SET}"]
    assert sorted(p.name for p in kaggle.target.iterdir()) == ["notes.txt", "test", "train"]
    said = capsys.readouterr().err
    assert f"downloading {SET}: 3.21 GB" in said and "4 files, 3 of them images" in said
    download.download(kaggle.target, SET)  # there already
    assert "nothing is downloaded" in capsys.readouterr().err


def test_an_interrupted_copy_does_not_look_like_a_set(kaggle, monkeypatch, tmp_path):
    for i in range(3):
        touch(tmp_path, f"cache/train/A/{i}.jpeg")
    hub(monkeypatch, lambda name: str(tmp_path / "cache"))
    copied, copy2 = [], shutil.copy2

    def copy(source, place):
        if copied:
            raise KeyboardInterrupt
        copied.append(copy2(source, place))

    monkeypatch.setattr(shutil, "copy2", copy)
    with pytest.raises(KeyboardInterrupt):
        download.download(kaggle.target, SET)
    assert not kaggle.target.exists()


def test_a_full_disk_is_found_before_the_copy(kaggle, monkeypatch, tmp_path):
    (tmp_path / "cache/train").mkdir(parents=True)
    (tmp_path / "cache/train/a.png").write_bytes(b"x" * 1000)
    hub(monkeypatch, lambda name: str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=999))
    with pytest.raises(InputError, match="disk has 0 MB free"):
        download.download(kaggle.target, SET)


COMMAND = """#!{python}
import os, sys
folder = sys.argv[sys.argv.index("-p") + 1]
{body}
"""


def command(tmp_path, monkeypatch, body):
    """A `kaggle` on the PATH with this body."""
    place = tmp_path / "bin/kaggle"
    place.parent.mkdir()
    place.write_text(COMMAND.format(python=sys.executable, body=body))
    place.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(place) if name == "kaggle" else None)
    monkeypatch.setenv("PATH", str(place.parent), prepend=os.pathsep)


@pytest.mark.skipif(os.name == "nt", reason="a script is no program there")
def test_the_command_fetches_a_set(kaggle, tmp_path, monkeypatch, capsys):
    body = "os.makedirs(folder + '/x/train/A'); open(folder + '/x/train/A/1.png', 'w').write('.')"
    command(tmp_path, monkeypatch, body)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))
    download.download(kaggle.target, SET)
    assert (kaggle.target / "train/A/1.png").exists() and len(list(kaggle.target.iterdir())) == 1
    assert "1 files, 1 of them images" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="a script is no program there")
def test_the_command_that_is_refused(kaggle, tmp_path, monkeypatch):
    command(tmp_path, monkeypatch, "open(folder + '/half.zip', 'w'); sys.exit('403 - Forbidden')")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))
    assert "kaggle: 403, not allowed (403 - Forbidden)" in message(kaggle)
    assert not kaggle.target.exists()


def test_progress_of_a_download_is_the_growth_of_its_folder(tmp_path, monkeypatch):
    """3, then 7, then more than all of 9 MB: a step each, never past the end."""
    steps = iter([3_000_000, 7_000_000, 20_000_000])
    process = SimpleNamespace(left=3)

    def poll():
        process.left -= 1
        return None if process.left >= 0 else 0

    process.poll = poll
    monkeypatch.setattr(download, "bytes_in", lambda folder: next(steps))
    seen = []

    def progress(items, total, title, unit, size):
        assert (total, unit) == (9, "MB")
        for item in items:
            seen.append(size(item))
            yield item

    monkeypatch.setattr(download, "progress", progress)
    download.watch(process, tmp_path, 9_000_000, every=0)
    assert seen == [3, 4, 2]

"""Which Kaggle account a download can use, and what Kaggle answered, in words. No secret is ever shown."""

import errno
import http.client
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

SETTINGS = "https://www.kaggle.com/settings/api"
NO_ANSWER = 0  # in place of an HTTP status
ABSENT = "not there"
WORDS = {
    401: "401, the account was not accepted",
    403: "403, not allowed",
    404: "404, there is no such set, or it is private",
    429: "429, too many requests",
    NO_ANSWER: "Kaggle did not answer",
}
LOST = (
    r"Max retries|Failed to resolve|Name or service|getaddrinfo|Connection|timed out|Network is unreach|Proxy"
)


class Place(NamedTuple):
    """Where an account may be kept. `usable`: whether one is there; `says`: what was found, as text."""

    name: str
    usable: bool
    says: str


# ---------------------------------------------------------------- which account


def places():
    """The Places that kagglehub and the kaggle command look into, the first usable one of which counts."""
    try:
        home = Path.home() / ".kaggle"
    except RuntimeError:  # nobody knows where it is
        home = Path("~", ".kaggle")
    found = [_login(), _token(), _token_file(home), _user_and_key(), _kaggle_json(home)]
    return [*found, _colab(any(place.usable for place in found)), _kaggle_login(home)]


def _token():
    """KAGGLE_API_TOKEN in the environment: a token, or the file that holds one."""
    name, token = "environment: KAGGLE_API_TOKEN", os.environ.get("KAGGLE_API_TOKEN", "")
    if os.path.isfile(token):
        usable, says = _readable(Path(token))
        return Place(name, usable, f"names the file {token}: {says}")
    says = "set" if token else "not set"
    if re.search(r"\s", token.strip()):
        says = "set, but with a space or a line break inside: copy it again"
    return Place(name, bool(token), says)


def _token_file(home):
    """The file that holds a token alone."""
    found = [
        Place(str(path), *_readable(path)) for path in (home / "access_token", home / "access_token.txt")
    ]
    there = [place for place in found if place.says != ABSENT]
    return next((place for place in found if place.usable), [*there, found[0]][0])


def _readable(path):
    """(whether a file holds anything, what is said of it)."""
    try:
        usable = bool(path.read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return False, ABSENT
    except (OSError, UnicodeDecodeError) as error:
        return False, f"there, but cannot be read ({getattr(error, 'strerror', None) or 'no text'})"
    return usable, "found" if usable else "there, but empty"


def _user_and_key():
    """The older pair of variables, of which one alone is not used."""
    names = ("KAGGLE_USERNAME", "KAGGLE_KEY")
    given = [name for name in names if os.environ.get(name)]
    says = "set" if given else "not set"
    if len(given) == 1:
        says = f"{given[0]} alone is set, so it is not used"
    return Place(f"environment: {' and '.join(names)}", len(given) == 2, says)


def _kaggle_json(home):
    """The older file, where KAGGLE_CONFIG_DIR says or in the usual place."""
    xdg = Path(os.environ.get("XDG_CONFIG_HOME") or home.parent / ".config", "kaggle")
    # The kaggle command looks there where there is no ~/.kaggle.
    usual = home if not xdg.is_dir() or home.exists() else xdg
    path = Path(os.environ.get("KAGGLE_CONFIG_DIR") or usual, "kaggle.json")
    usable, says = _readable(path)
    if not usable:
        return Place(str(path), False, says)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return Place(str(path), False, "there, but not JSON: download it again")
    missing = [key for key in ("username", "key") if not isinstance(content, dict) or not content.get(key)]
    if missing:
        return Place(str(path), False, f"there, but without {' and '.join(missing)}")
    return Place(str(path), True, "found")


def _login():
    """kagglehub.login(), which holds in the process that called it."""
    name, config = "kagglehub.login()", _kagglehub_config()
    if config is None:
        return Place(name, False, "kagglehub was not loaded")
    usable = getattr(config, "_kaggle_credentials", None) is not None
    return Place(name, usable, "found" if usable else "none in this process, where alone it holds")


def _colab(explained):
    """The secrets of Colab, which only kagglehub reads. `explained`: whether another place has an account,
    which kagglehub then takes."""
    name, config = "secrets of Colab", _kagglehub_config()
    if config is None or explained:
        return Place(name, False, "not asked")
    try:
        usable = config.get_kaggle_credentials() is not None
    except Exception:  # a damaged kaggle.json, which has its own line
        usable = False
    return Place(name, usable, "found" if usable else "none")


def _kagglehub_config():
    """kagglehub's own settings; None where it was not imported."""
    return getattr(sys.modules.get("kagglehub"), "config", None)


def _kaggle_login(home):
    """What `kaggle auth login` keeps, which the kaggle command alone reads."""
    path = home / "credentials.json"
    usable, says = _readable(path)
    says += "; only the kaggle command reads it" if usable else ""
    return Place(f"{path} (kaggle auth login)", usable, says)


# ---------------------------------------------------------------- what was answered


def status_of(error):
    """The HTTP status of an exception or of what caused it; NO_ANSWER where Kaggle was not reached; None for
    another fault."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", getattr(error, "code", None))
        if isinstance(status, int):
            return status
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return None
        if isinstance(error, (ConnectionError, TimeoutError)) or re.search(LOST, str(error)):
            return NO_ANSWER
        error = error.__cause__ or error.__context__
    return None


def status_of_text(text):
    """The same of what the kaggle command has printed."""
    if "Authentication required" in text or "Could not find kaggle.json" in text:
        return 401
    if found := re.search(r"\b([45]\d\d)(?= *(?:-|Client|Server|Unauth|Forbid|Not Found))", text):
        return int(found[1])
    return NO_ANSWER if re.search(LOST, text) else None


def in_words(status):
    """An HTTP status, or NO_ANSWER, as text."""
    if status in WORDS:
        return WORDS[status]
    return f"{status}, {http.client.responses.get(status, 'an error').lower()}"


def advice(status, found, name):
    """What to do about an answer, as a sentence; `found`: the Places."""
    account = next((place.name for place in found if place.usable), None)
    new = f"make a token at {SETTINGS} and set KAGGLE_API_TOKEN to it"
    if status == NO_ANSWER:
        proxy = next((n for n in ("HTTPS_PROXY", "https_proxy") if os.environ.get(n)), None)
        if proxy:
            return f"Is there a network, and does the proxy answer that {proxy} names?"
        return "Is there a network? Behind a proxy, set HTTPS_PROXY."
    if status == 404:
        return f"Is the name right? It is the end of the address of the set's page: datasets/{name}."
    if status == 429:
        return "Wait some minutes, and try again."
    if status in (401, 403) and account is None:
        return f"No account was found, and this set wants one: {new}."
    if status == 401:
        return f"Kaggle does not know the account of {account} (any more): {new}."
    if status == 403:
        return (
            f"The account of {account} may not read this set: open "
            f"https://www.kaggle.com/datasets/{name} with it, and accept the terms."
        )
    if status is not None and status >= 500:
        return "The fault is Kaggle's: try again later."
    return ""

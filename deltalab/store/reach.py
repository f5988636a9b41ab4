"""Whether the hub answers: asked once a process, so that no library tries again for minutes."""

import ssl
import sys
import urllib.error
import urllib.request
from functools import cache

SECONDS = 5.0


@cache
def hub_answers() -> bool:
    """Whether the hub answers within seconds, through a proxy if there is one.

    False without asking where HF_HUB_OFFLINE says so, or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError:
        return False
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the libraries may know its certificate
    except OSError:
        return False
    return True


def settle() -> bool:
    """Return `hub_answers`; where it does not, let the hub's libraries look into their caches only.

    They would otherwise try every request five times, with a warning each.
    """
    if hub_answers():
        return True
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            setattr(sys.modules[name], "HF_HUB_OFFLINE", True)  # noqa: B010
    return False


def reason(error: BaseException) -> str:
    """Return the first line of what a library says, or that the hub does not answer."""
    if isinstance(error, OSError) and not hub_answers():
        return "the hub cannot be reached"
    return (str(error).strip() or type(error).__name__).splitlines()[0]

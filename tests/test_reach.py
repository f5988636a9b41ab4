"""A hub that does not answer: said once, within seconds, by whatever would ask it."""

import http.server
import socket
import threading
import time

import pytest

pytest.importorskip("huggingface_hub")

from huggingface_hub import constants

from deltalab.store import reach


class Hub(http.server.BaseHTTPRequestHandler):
    status, asked = 200, []

    def do_HEAD(self):
        self.asked.append(self.path)
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    """Let the hub be where the test says; what is known of the real one is put back after it."""
    before = constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reach, "SECONDS", 1.0)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    reach.hub_answers.cache_clear()
    yield lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)
    reach.hub_answers.cache_clear()
    constants.HF_HUB_OFFLINE = before


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "answers"), [(200, True), (403, True), (404, True), (503, False)]
)
def test_a_hub_is_asked_once(endpoint, hub, status, answers, monkeypatch):
    monkeypatch.setattr(Hub, "status", status)
    monkeypatch.setattr(Hub, "asked", [])
    endpoint(hub)
    assert [reach.settle(), reach.settle()] == [answers, answers]
    assert len(Hub.asked) == 1
    assert constants.HF_HUB_OFFLINE is not answers


def test_a_hub_that_is_silent_or_not_there_costs_seconds(endpoint):
    """On the code before, a name that resolves was enough, and every file was tried for minutes."""
    begun = time.monotonic()
    endpoint("http://127.0.0.1:9")
    assert not reach.settle()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reach.hub_answers.cache_clear()
        constants.HF_HUB_OFFLINE = False
        endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not reach.settle()
    assert time.monotonic() - begun < 10


def test_whatever_asks_the_hub_says_so_in_one_line(endpoint, monkeypatch, capfd):
    from deltalab.data.images import HubImages
    from deltalab.data.rows import read
    from deltalab.models import hub, timm_vit

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    endpoint("http://127.0.0.1:9")
    begun = time.monotonic()
    for ask in (
        lambda: hub.directory("org/name", "model.pre"),
        lambda: hub.identity("org/name", "model.pre"),
        lambda: timm_vit.locate("org/name", "model.pre"),
        lambda: read("org/name", split="train"),
        lambda: HubImages("org/name", "train").open(None, 1),
    ):
        with pytest.raises(FileNotFoundError, match="the hub cannot be reached") as caught:
            ask()
        assert str(caught.value).startswith(("model.pre=org/name: ", "data.path=org/name: "))
        assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 30
    out, err = capfd.readouterr()
    assert (out + err).count("\n") <= 1, "no warning for every attempt"

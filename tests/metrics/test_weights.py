"""Weights are found where they lie, used only when whole, fetched and added only with the published hash."""

from __future__ import annotations

import hashlib
import http.server
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from stabletrain.errors import ConfigError, DataError
from stabletrain.metrics import weights

CONTENT = bytes(range(256)) * 20
ask = weights.online  # the real one, also where a test replaces it


class Server(http.server.ThreadingHTTPServer):
    """On the loopback: answers `content`, the first `broken` times cut short, and counts what it was asked."""

    content = CONTENT
    broken = 0
    asked = 0


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.asked += 1
        if self.path != "/file.pth":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        cut = len(self.server.content) // 2 if self.server.asked <= self.server.broken else None
        self.wfile.write(self.server.content[:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """A small file in the place of the real one, its server for the network, and empty folders."""
    monkeypatch.setenv("STABLETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    file = replace(
        weights.INCEPTION,
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
        url=f"http://127.0.0.1:{server.server_port}/file.pth",
    )
    monkeypatch.setattr(weights, "INCEPTION", file)
    monkeypatch.setattr(weights, "KNOWN", {file.name: file})
    ask.cache_clear()
    yield file
    ask.cache_clear()


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(weights, "online", lambda url: False)


def put(folder: Path, name: str, content: bytes = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


# --- finding --------------------------------------------------------------------------------------------------


def test_the_published_file_is_known_by_the_prefix_in_its_name():
    assert weights.INCEPTION.sha256.startswith(weights.INCEPTION.file_name.split("-")[-1].removesuffix(".pth"))
    assert len(weights.INCEPTION.sha256) == 64


def test_the_order_of_search(published, offline, tmp_path, monkeypatch):
    in_old_torch = put(tmp_path / "torch" / "checkpoints", published.file_name)
    assert weights.find_inception() == in_old_torch
    of_torch_fidelity = put(tmp_path / "torch" / "hub" / "checkpoints", published.other_names[0])
    assert weights.find_inception() == of_torch_fidelity
    of_pytorch_fid = put(tmp_path / "torch" / "hub" / "checkpoints", published.file_name)
    assert weights.find_inception() == of_pytorch_fid
    ours = put(tmp_path / "home" / "weights", published.file_name)
    assert weights.find_inception() == ours
    given = put(tmp_path, "mine.npz", b"another content")
    assert weights.find_inception(str(given)) == given


def test_torchs_folder_follows_the_environment(published, offline, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = put(tmp_path / "xdg" / "torch" / "hub" / "checkpoints", published.file_name)
    assert weights.find_inception() == path


def test_nothing_found_says_what_to_put_where(published, offline):
    with pytest.raises(DataError, match=r"not on this machine.*http://.*weights add") as caught:
        weights.find_inception()
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named_and_not_used(published, offline, tmp_path, caplog):
    damaged = put(tmp_path / "torch" / "hub" / "checkpoints", published.file_name, CONTENT[:-1])
    with pytest.raises(DataError):
        weights.find_inception()
    assert str(damaged) in caplog.text
    whole = put(tmp_path / "torch" / "checkpoints", published.file_name)
    assert weights.find_inception() == whole


def test_a_given_path_must_be_what_its_name_says(published, tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        weights.find_inception(str(tmp_path / "missing.pth"))
    with pytest.raises(DataError, match="its content is another"):
        weights.find_inception(str(put(tmp_path, published.file_name, CONTENT[:-1])))


def test_status_says_ready_damaged_or_missing(published, tmp_path):
    (status,) = weights.weights_status()
    assert (status.name, status.state, status.path) == ("inception2015", "missing", None)
    assert status.looked_in[0] == tmp_path / "home" / "weights"
    damaged = put(tmp_path / "home" / "weights", published.file_name, b"half")
    assert [(s.state, s.path) for s in weights.weights_status()] == [("damaged", damaged)]
    whole = put(tmp_path / "torch" / "checkpoints", published.file_name)
    assert [(s.state, s.path) for s in weights.weights_status()] == [("ready", whole)]


# --- fetching -------------------------------------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_fetching_checks_and_keeps(published, server, tmp_path):
    ticks = []
    path = weights.find_inception(progress=lambda *tick: ticks.append(tick))
    assert path == tmp_path / "home" / "weights" / published.file_name
    assert path.read_bytes() == CONTENT
    assert ticks[-1] == (f"fetching {published.file_name}", len(CONTENT), len(CONTENT))
    assert weights.find_inception() == weights.fetch_weights() == path
    assert server.asked == 1
    assert left(path.parent) == [published.file_name]


def test_a_broken_transfer_is_tried_again(published, server, caplog):
    server.broken = 2
    assert weights.fetch_weights().read_bytes() == CONTENT
    assert server.asked == 3
    assert caplog.text.count("trying again") == 2


def test_a_transfer_that_always_breaks_leaves_nothing(published, server, tmp_path):
    server.broken = 99
    with pytest.raises(DataError, match="cannot fetch"):
        weights.fetch_weights()
    assert server.asked == weights.ATTEMPTS
    assert left(tmp_path / "home" / "weights") == []


@pytest.mark.parametrize("content", [CONTENT[::-1], CONTENT + b"more"])
def test_another_content_is_refused(content, published, server, tmp_path):
    server.content = content
    with pytest.raises(DataError, match="its SHA-256"):
        weights.fetch_weights()
    assert server.asked == 1
    assert left(tmp_path / "home" / "weights") == []


def test_a_mirror_and_a_folder_can_be_named(published, server, tmp_path):
    with pytest.raises(DataError, match="404"):
        weights.fetch_weights(url=f"http://127.0.0.1:{server.server_port}/elsewhere.pth")
    path = weights.fetch_weights(url=published.url, folder=tmp_path / "bundle")
    assert path == tmp_path / "bundle" / published.file_name


def test_no_network_is_noticed_within_a_second(published, server, monkeypatch):
    closed = published.url.replace(str(server.server_port), "1")
    with pytest.raises(DataError, match="does not answer"):
        weights.fetch_weights(url=closed)
    assert server.asked == 0
    assert weights.online(published.url)


def test_the_proxy_is_what_must_answer(published, server, monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.server_port}")
    assert weights.online("https://nowhere.invalid/file.pth")
    monkeypatch.setenv("no_proxy", "elsewhere.invalid")
    assert not weights.online("https://elsewhere.invalid/file.pth")


def test_unknown_weights(published):
    with pytest.raises(ConfigError, match="did you mean 'inception2015'"):
        weights.fetch_weights("inception2016")


# --- adding ---------------------------------------------------------------------------------------------------


def test_an_added_file_is_found_under_its_published_name(published, offline, tmp_path):
    path = weights.add_weights(put(tmp_path, "download(1).pth"))
    assert path == weights.find_inception() == tmp_path / "home" / "weights" / published.file_name
    assert weights.add_weights(path) == path
    assert path.read_bytes() == CONTENT
    assert left(path.parent) == [published.file_name]


def test_only_published_files_are_added(published, tmp_path):
    with pytest.raises(DataError, match="--inception FILE"):
        weights.add_weights(put(tmp_path, published.file_name, b"something else"))
    with pytest.raises(DataError, match="is not a file"):
        weights.add_weights(tmp_path / "missing.pth")


def test_a_folder_that_cannot_be_written_is_named(published, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file in the way")
    with pytest.raises(DataError, match=r"cannot write to .*home/weights"):
        weights.add_weights(put(tmp_path, "file.pth"))

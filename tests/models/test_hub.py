"""From what a person types to a folder, without a network."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors as hub_errors
import huggingface_hub.utils
import pytest

from models import hub
from models.errors import ModelError
from models.hub import resolve_model

MODEL = "some-org/some-model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def store(cache: Path, *files: str) -> Path:
    """Put a snapshot of MODEL into the cache, as a download would."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--some-org--some-model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


def refusal(model: str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hub_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def answer(kind: type[hub_errors.HfHubHTTPError], status: int) -> Exception:
    """The exception that an answer of the Hub with this status becomes."""
    error = kind.__new__(kind)
    Exception.__init__(error, "first line\nsecond line")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[assignment]
    return error


def test_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-org" / "some-model").mkdir(parents=True)
    assert resolve_model(MODEL) == tmp_path / "some-org" / "some-model"  # a folder wins over a Hub id
    assert resolve_model("./some-org") == tmp_path / "some-org"


def test_folder_has_no_revision(tmp_path: Path) -> None:
    assert "is a folder, which has no revision 'v2'" in refusal(str(tmp_path), revision="v2")


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert resolve_model("~/m") == tmp_path / "m"


@pytest.mark.parametrize("model", ["./nothing", "/no/such/folder", "~/nothing-here", "a/b/c", "with space", "", "-x"])
def test_no_such_folder(model: str) -> None:
    """What cannot be a Hub id is never looked up there."""
    message = refusal(model)
    assert f"there is no folder {model!r}" in message
    assert "Qwen/Qwen3-0.6B" in message


def test_file_instead_of_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("")
    assert "is a file; give the folder" in refusal(str(file))


def test_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.BUILT_IN_MODELS, "stet-tales", tmp_path)
    assert "stet-tales is missing from this installation" in refusal("stet-tales")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("stet-tales") == tmp_path


def test_offline_from_the_cache(cache: Path) -> None:
    snapshot = store(cache, "config.json", "model.safetensors")
    assert resolve_model(MODEL, offline=True) == snapshot


def test_offline_and_not_in_the_cache(cache: Path) -> None:
    message = refusal(MODEL, offline=True, revision="v2")
    assert f"{MODEL} at revision v2 is not a folder here nor whole in the Hub cache" in message
    assert "downloads are off" in message


def test_unreachable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_raises(monkeypatch, hub_errors.LocalEntryNotFoundError("a\nb"))
    assert "the Hub cannot be reached; check the network, or give a folder" in refusal(MODEL)


def test_weights_only_in_other_formats(cache: Path) -> None:
    store(cache, "config.json")
    message = refusal(MODEL, offline=True)
    assert "has no safetensors weights on the Hub" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            answer(hub_errors.RepositoryNotFoundError, 404),
            "is neither a folder here nor a model on the Hub",
        ),
        (answer(hub_errors.GatedRepoError, 403), "is gated: accept its terms"),
        (answer(hub_errors.RevisionNotFoundError, 404), "has no revision 'v2'"),
        (answer(hub_errors.HfHubHTTPError, 503), "(HTTP status 503)"),
        (hub_errors.HFValidationError("x"), "nor a valid Hub id"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("proxy\nbroke"), "(proxy broke)"),
    ],
)
def test_what_the_hub_answers(cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    hub_raises(monkeypatch, error)
    message = refusal(MODEL, revision="v2")
    assert MODEL in message
    assert words in message


def test_download_asks_for_no_pickles_and_no_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_text("")
    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    lines: list[str] = []
    assert resolve_model(MODEL, "v2", progress=lines.append) == tmp_path
    assert (asked["model"], asked["revision"]) == (MODEL, "v2")
    assert len(lines) == 2
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "pytorch_model.bin",
        "modeling_custom.py",
        "original/model.safetensors",
        "consolidated.safetensors",
    ]
    wanted = list(
        huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
        )
    )
    assert wanted == files[:4]


WEIGHTS = bytes(range(256)) * 40_000  # ten megabytes


class Hub(ThreadingHTTPServer):
    """What the client asks the Hub for, of one repository with two commits. `breaks`: how many times the connection
    breaks in the middle of the weights; `requests`: path and Range of each download."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.breaks = 0
        self.requests: list[tuple[str, str | None]] = []
        self.commits = {"main": "a" * 40, "v2": "b" * 40}
        self.files = {
            commit: {"config.json": b'{"of": "%s"}' % revision.encode(), "model.safetensors": WEIGHTS, "code.py": b"1"}
            for revision, commit in self.commits.items()
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        commits = self.server.commits
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            revision = parts[5] if len(parts) > 5 else "main"
            commit = commits.get(revision, revision)
            files = self.server.files[commit]
            if parts[4] == "tree":
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                self.send(json.dumps(entries).encode(), body, {"Content-Type": "application/json"})
            else:
                info = {"id": MODEL, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                self.send(json.dumps(info).encode(), body, {"Content-Type": "application/json"})
            return
        revision, name = parts[3], parts[4]
        commit = commits.get(revision, revision)
        data = self.server.files[commit][name]
        headers = {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if body:
            self.server.requests.append((name, asked))
        if asked and asked.startswith("bytes="):
            start = int(asked[6:].split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.send(data[start:], body, headers, 206)
        elif body and name == "model.safetensors" and self.server.breaks:
            self.server.breaks -= 1
            self.send(data, body, headers, cut=len(data) // 2)
        else:
            self.send(data, body, headers)

    def send(self, data: bytes, body: bool, headers: dict[str, str], status: int = 200, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


@pytest.fixture
def served_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine, which the client takes for the real one."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield server
        server.shutdown()
        thread.join()


def test_download_by_id_and_revision_then_offline(served_hub: Hub) -> None:
    lines: list[str] = []
    folder = resolve_model(MODEL, "v2", progress=lines.append)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]  # never code
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert json.loads((folder / "config.json").read_text()) == {"of": "v2"}
    assert folder.name == "b" * 40
    assert lines[0] == f"Looking up {MODEL} at revision v2 on the Hugging Face Hub"
    assert f"Downloading {MODEL}: 10.2 of 10.2 MB" in lines
    asked = len(served_hub.requests)
    assert resolve_model(MODEL, "v2", offline=True) == folder
    assert resolve_model(MODEL, "v2") == folder
    assert len(served_hub.requests) == asked  # what is whole is not fetched again
    other = resolve_model(MODEL)
    assert json.loads((other / "config.json").read_text()) == {"of": "main"}


def test_a_connection_that_breaks_is_resumed_where_it_broke(served_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 20)  # what is kept of it
    served_hub.breaks = 1
    folder = resolve_model(MODEL, progress=lambda line: None)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [asked for name, asked in served_hub.requests if name == "model.safetensors"]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert ranges[1] is not None
    assert 0 < int(ranges[1].removeprefix("bytes=").split("-")[0]) <= len(WEIGHTS) // 2


def test_what_a_download_raises_reaches_the_caller(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_raises(monkeypatch, answer(hub_errors.GatedRepoError, 403))
    assert "is gated" in refusal(MODEL, progress=lambda line: None)

"""From what a person types to a folder, without a network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

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

"""From what a person typed to a folder: a built-in model, a local folder, or a model of the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from models.download import download
from models.errors import ModelError

BUILT_IN_MODELS: dict[str, Path] = {"stet-tales": Path(__file__).parent / "tales"}

# A name or owner/name; what starts with a dot, ~ or /, or lies deeper, can only be meant as a folder.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# What is fetched: configuration, tokenizer and safetensors at the top of the repository. Never pickles, never code,
# and no second copy of the weights (original/, consolidated.safetensors).
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_UNWANTED = ["*/*", "consolidated*.safetensors"]
_CONFIGURATION = ["config.json", "generation_config.json"]


def resolve_model(
    model: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """The folder that holds `model`: a built-in name ("stet-tales"), a folder, or a Hub id ("Qwen/Qwen3-0.6B").

    A folder wins over a Hub id of the same name. A Hub model is taken from the cache or downloaded into it at
    `revision` (a branch, tag or commit; None is the main branch, and all that a folder has); with `offline` only the
    cache is looked at.
    `progress` gets a line before a download begins, twice a second while it lasts, and when it is done. What an earlier
    download left whole is not fetched again (`models.download`). Raises ModelError.
    """
    folder = _local_folder(model, revision)
    return folder or _from_hub(model, revision, offline, progress, _WANTED, _with_weights)


def resolve_config(
    model: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """`resolve_model` for those who only want to read the configuration: of a Hub model, nothing else is downloaded,
    and a folder need not hold weights. Raises ModelError."""
    folder = _local_folder(model, revision)
    return folder or _from_hub(model, revision, offline, progress, _CONFIGURATION, _with_config)


def _local_folder(model: str, revision: str | None) -> Path | None:
    """The folder of a built-in model or one of this machine; None for what can only be a Hub id. Raises ModelError."""
    if model in BUILT_IN_MODELS:
        folder = BUILT_IN_MODELS[model]
        if not (folder / "config.json").is_file():
            raise ModelError(f"the built-in model {model} is missing from this installation; install Stet again")
        return folder
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        if revision is not None:
            raise ModelError(f"{model} is a folder, which has no revision {revision!r}; leave the revision out")
        return folder.resolve()
    if folder.is_file():
        raise ModelError(f"{model} is a file; give the folder that holds config.json and *.safetensors")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"there is no folder {model!r}; check the path, or give a Hub id like Qwen/Qwen3-0.6B")
    return None


def _from_hub(
    model: str,
    revision: str | None,
    offline: bool,
    progress: Callable[[str], None] | None,
    wanted: list[str],
    check: Callable[[Path, str], Path],
) -> Path:
    # Imported here: it takes half a second and most starts need only a folder.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(local_files_only: bool, bars: type | None = None) -> str:
        return snapshot_download(
            model,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=_UNWANTED,
            local_files_only=local_files_only,
            tqdm_class=bars,
        )

    at = f" at revision {revision}" if revision else ""
    try:
        if offline:
            return check(Path(fetch(local_files_only=True)), model)
        if progress is None:
            return check(Path(fetch(local_files_only=False)), model)
        progress(f"Looking up {model}{at} on the Hugging Face Hub")
        folder = Path(download(lambda bars: fetch(False, bars), model, progress))
        progress(f"{model}{at} is in {folder}")
        return check(folder, model)
    except ModelError:
        raise
    except GatedRepoError:
        raise ModelError(
            f"{model} is gated: accept its terms on its Hub page, then set HF_TOKEN to a token of that account"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{model} is neither a folder here nor a model on the Hub; check the name, or set HF_TOKEN if it is private"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{model} has no revision {revision!r} on the Hub; check the branch, tag or commit") from None
    except HFValidationError:
        raise ModelError(f"{model!r} is neither a folder here nor a valid Hub id like Qwen/Qwen3-0.6B") from None
    except LocalEntryNotFoundError:
        if offline:
            raise ModelError(
                f"{model}{at} is not a folder here nor whole in the Hub cache, and downloads are off; "
                "download it once while online, or give a folder"
            ) from None
        raise ModelError(
            f"{model}{at} is not a folder here nor whole in the Hub cache, and the Hub cannot be reached; "
            "check the network, or give a folder"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", "no")
        raise ModelError(f"the Hub refused {model}{at} (HTTP status {status}); try again, or give a folder") from None
    except Exception as error:  # the client's transport has exceptions of its own, which change with its version
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{model}{at} could not be downloaded ({reason}); check the network and the space on the disk"
        ) from None


def _with_weights(folder: Path, model: str) -> Path:
    """Pass `folder` on if it has safetensors. Other formats were not downloaded, so only the Hub can tell of them."""
    if any(folder.glob("*.safetensors")):
        return folder
    raise ModelError(
        f"{model} has no safetensors weights on the Hub, and other formats are not read; look for a revision or a "
        "repository that has them, or convert: AutoModelForCausalLM.from_pretrained(model).save_pretrained(new_folder)"
    )


def _with_config(folder: Path, model: str) -> Path:
    """Pass `folder` on if it has a configuration."""
    if (folder / "config.json").is_file():
        return folder
    raise ModelError(f"{model} has no config.json on the Hub; look for a repository in the Hugging Face layout")

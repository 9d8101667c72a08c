"""Where a model is: a folder, a GGUF file, or a repository of the Hugging Face Hub, looked up in its cache first."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from pathlib import Path

from models.files import CheckpointError
from models.vocabularies.tokenizer_files import TOKENIZER_FILES
from models.weights import INDEX_SUFFIX, SAFETENSORS_FILE, TORCH_FILE, weight_files

GGUF_SUFFIX = ".gguf"
TIMEOUT = 10  # seconds for the Hub to answer at all: a mistyped folder should not wait long
# Named one by one: a repository may also hold weights of other precisions and frameworks, larger than what is read.
SAFETENSORS_PATTERNS = [SAFETENSORS_FILE, SAFETENSORS_FILE + INDEX_SUFFIX, "model-*-of-*.safetensors"]
TORCH_PATTERNS = [TORCH_FILE, TORCH_FILE + INDEX_SUFFIX, "pytorch_model-*-of-*.bin"]
OTHER_PATTERNS = ["config.json", "generation_config.json", "target_tokenizer.json", "*.txt", *TOKENIZER_FILES]


def resolve_folder(model: str | Path) -> Path:
    """The folder, or GGUF file, that a model is read from; one on the Hub is downloaded unless the cache has it.

    Raises CheckpointError for what is in none of these places.
    """
    path = Path(model)
    if not str(model):
        raise CheckpointError("the model's name is empty: expected a folder, a .gguf file or the id of a repository")
    if path.is_dir() or (path.suffix == GGUF_SUFFIX and path.is_file()):
        return path
    if path.exists():
        raise CheckpointError(f"{path} is neither a checkpoint folder nor a {GGUF_SUFFIX} file")
    if isinstance(model, Path) or not _is_repository(model) or path.suffix == GGUF_SUFFIX:
        raise CheckpointError(f"no model {'file' if path.suffix == GGUF_SUFFIX else 'folder'} at {path}")
    return _cached(model) or _downloaded(model)


def _is_repository(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _cached(repository: str) -> Path | None:
    """The repository's folder in the cache, if every file that is read was downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for patterns in (SAFETENSORS_PATTERNS, TORCH_PATTERNS):
        try:
            wanted = [*OTHER_PATTERNS, *patterns]
            folder = Path(snapshot_download(repository, local_files_only=True, allow_patterns=wanted))
            weight_files(folder)
        except (LocalEntryNotFoundError, CheckpointError):
            continue
        if (folder / "config.json").is_file():
            return folder
    return None


def _downloaded(repository: str) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    absent = f"there is no folder {repository}, and the Hub"
    if not _resolves(constants.ENDPOINT):
        raise CheckpointError(f"{absent} cannot be reached: its address is unknown here")
    try:
        files = {file.rfilename for file in HfApi().model_info(repository, timeout=TIMEOUT).siblings or ()}
        patterns = SAFETENSORS_PATTERNS if files & set(SAFETENSORS_PATTERNS) else TORCH_PATTERNS
        return Path(snapshot_download(repository, allow_patterns=[*OTHER_PATTERNS, *patterns]))
    except GatedRepoError:
        raise CheckpointError(f"{absent} wants its terms for {repository} accepted, by an account logged in") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{absent} has no model of that name, or it is private") from None
    except Exception as error:  # what the HTTP client underneath raises has changed between versions
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
        raise CheckpointError(f"{absent} cannot be reached: {reason}") from None


def _resolves(address: str) -> bool:
    """Whether a machine's name is known: asking first spares who is offline the client's half minute of retries."""
    if urllib.request.getproxies():
        return True  # where names are the proxy's to look up
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(address).hostname, None)
    except OSError:
        return False
    return True

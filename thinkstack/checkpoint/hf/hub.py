"""Download of hub checkpoints by name into the cache of huggingface_hub; only weight and text files."""

import re
from pathlib import Path

from thinkstack.types import ConfigError

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
DOWNLOAD_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt")
"""File patterns of a download, in the top folder only; no pickles."""


def is_hub_name(text: str) -> bool:
    """Whether the text has the form OWNER/NAME."""
    return NAME.fullmatch(text) is not None


def fetch(name: str) -> Path:
    """Download OWNER/NAME if necessary and return its folder in the cache of huggingface_hub.

    Broken connections are retried; the complete files of an interrupted download are reused. The library uses
    HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Without a network, the newest cached version is used. Raises
    ConfigError if no version is cached, or if the hub denies access.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(DOWNLOAD_PATTERNS), ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise ConfigError(
            f"{name} requires an agreement; accept it on the model's hub page and set HF_TOKEN to your token"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{name} is neither a local folder nor a model of the hub; correct the name, or set HF_TOKEN if the model "
            "is private"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{name} is not a local folder, and the hub cannot be reached; connect to the network, or give a "
            "checkpoint folder"
        ) from error
    except Exception as error:  # versions of the library use different HTTP clients with different errors
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"fetching {name} failed ({reason}); run the same command again to fetch the missing files"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{name} has no safetensors files, and pickles are never fetched; convert the model with transformers "
            "(save_pretrained) on a machine you trust"
        )
    return folder

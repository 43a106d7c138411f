"""Checkpoints of a hub by name: fetched once into its cache, files of weights and text only."""

import re
from pathlib import Path

from thinkstack.types import ConfigError

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FETCHED = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt")
"""Patterns of what is fetched, from the top folder; above all no pickles."""


def is_hub_name(text: str) -> bool:
    """Whether it reads like OWNER/NAME."""
    return NAME.fullmatch(text) is not None


def fetch(name: str) -> Path:
    """The folder of OWNER/NAME in the cache of huggingface_hub. A connection that breaks is taken up again; of a
    download that was given up the whole files are kept.

    HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are those of that library. Without a network the newest cached
    state is taken. Raises ConfigError if there is none, or the hub refuses.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FETCHED), ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise ConfigError(
            f"{name} asks for an agreement; accept it on its page of the hub and set HF_TOKEN to your token"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{name} is neither a folder here nor a model of the hub; correct it, or set HF_TOKEN if it is private"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{name} is no folder here, and the hub cannot be reached; connect, or give a folder with the checkpoint"
        ) from error
    except Exception as error:  # versions of the library use different HTTP clients, each with errors of its own
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"fetching {name} failed ({reason}); the same command goes on with the files that are missing"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{name} has no safetensors files, and pickles are never fetched; convert it with transformers "
            "(save_pretrained) on a machine you trust"
        )
    return folder

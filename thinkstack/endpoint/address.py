"""The address of a server, and the key that it is asked with. Messages never contain a key."""

import os
import re
from urllib.parse import urlsplit

from thinkstack.types import ConfigError


def check_url(url: str) -> str:
    """The host of an address, without its port. Raises ConfigError for anything but http(s)://host[:port][/path]."""
    try:
        address = urlsplit(url)
        host, _ = address.hostname, address.port
    except ValueError:  # a port that is no number, an open bracket
        address, host = urlsplit(""), None
    if address.username is not None or address.password is not None or address.query or address.fragment:
        raise ConfigError(
            f"the address of {host or 'the server'} has a user, a password or a query, which may be a secret; write it "
            "as http://host:port/v1, and the key into an environment variable"
        )
    if address.scheme not in ("http", "https") or not host or re.search(r"\s", url):
        raise ConfigError(f"{url!r} is not the address of a server; write it as http://host:port/v1")
    return host


def find_api_key(host: str, variable: str = "") -> str:
    """The key in the environment: that of `variable`, else DEEPSEEK_API_KEY for deepseek.com and OPENAI_API_KEY for
    other hosts; "" without.

    Raises ConfigError if `variable` is not set, or if a key cannot be sent.
    """
    is_deepseek = host == "deepseek.com" or host.endswith(".deepseek.com")
    name = variable or ("DEEPSEEK_API_KEY" if is_deepseek else "OPENAI_API_KEY")
    key = os.environ.get(name, "").strip()
    if variable and not key:
        raise ConfigError(f"the environment variable {name} has no key for {host}; set it, or change api_key_env")
    return check_key(key, f"the environment variable {name}")


def check_key(key: str, what: str) -> str:
    """A key without blanks around it. Raises ConfigError if it cannot be a header. what: where the key is from."""
    key = key.strip()
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ConfigError(f"{what} is not a key: it has blanks or characters beyond ASCII; copy the key again")
    return key

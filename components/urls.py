"""Secrets that stand in URLs: found, so that nothing stores them, and hidden wherever a URL is shown."""

import re
from typing import NamedTuple
from urllib.parse import unquote

_HIDDEN = "***"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>|\\^`{}]+")
# What a query may say in the open; whatever else it names may be a secret.
_HARMLESS = {
    "application_name", "cache", "charset", "check_same_thread", "connect_timeout", "driver", "endpoint_override",
    "mode", "region", "scheme", "ssl_ca", "ssl_cert", "ssl_mode", "sslcert", "sslmode", "sslrootcert", "timeout", "uri",
    "workflowtype",
}  # fmt: skip


class _Parts(NamedTuple):
    """A URL, cut so that putting the parts together gives it back."""

    scheme: str
    user: str
    """User, password or token, with the `@` after it; mostly empty."""
    place: str
    """Host and path."""
    query: list[tuple[str, str, str]]
    """(`?`, `&` or `#`, name with its `=`, value) of all that follows."""


def shown_url(url: str) -> str:
    """The URL without user, password, token and what its query says under names that are not known to be harmless."""
    parts = _cut(url)
    query = [m + name + (_HIDDEN if value and not _is_harmless(name) else value) for m, name, value in parts.query]
    return parts.scheme + (f"{_HIDDEN}@" if parts.user else "") + parts.place + "".join(query)


def without_secrets(text: str, *urls: str) -> str:
    """The text with each URL in it as `shown_url`, and without the secrets of `urls`, wherever it repeats them."""
    for url in urls:
        for secret in secrets_in(url):
            text = text.replace(secret, _HIDDEN)
    return _URL.sub(lambda found: shown_url(found[0]), text)


def secrets_in(url: str) -> list[str]:
    """What a URL says that must not be shown, as it stands there and unescaped; none for what is no URL."""
    if not _URL.match(url):
        return []
    parts = _cut(url)
    user, _, password = parts.user.removesuffix("@").partition(":")
    found = [password or user, *(value for _, name, value in parts.query if not _is_harmless(name))]
    return [form for secret in found for form in dict.fromkeys((secret, unquote(secret))) if form]


def _is_harmless(name: str) -> bool:
    return unquote(name).removesuffix("=").lower() in _HARMLESS


def _cut(url: str) -> _Parts:
    scheme, mark, rest = url.partition("://")
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user = ""
    port = host.rpartition(":")[2] if ":" in host else ""
    if "@" in host:
        user = host[: host.rindex("@") + 1]
    elif port and not port.isdigit() and "]" not in port and "@" in rest:
        user = rest[: rest.rindex("@") + 1]  # a password with a slash in it
    rest = rest[len(user) :]
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    pieces = re.findall(r"([?&#;])([^=?&#;]*=)?([^?&#;]*)", rest[len(place) :])
    # A value without a name may be a token in http; elsewhere it is part of a path, such as a glob's.
    web = scheme.lower() in ("http", "https")
    query = [(m, name, value) if name or (web and m != "#") else (m, value, "") for m, name, value in pieces]
    return _Parts(scheme + mark, user, place, query)

"""Ids of samples that have none of their own: hashes in memory, keyed in every file.

Who nearly knows a text finds the rest from its hash by trying. In memory a hash is told by its name, `sha256:...`, and
is the same everywhere. On its way into a file it becomes `hmac:...`, made with a random key that lies beside the file.
So nothing that is computed depends on a key, and nothing that is written leads back without one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import DiskFullError, disk_full

KEY_FILE = "ids.key"
PLAIN = re.compile(r"sha256:[0-9a-f]{16}")
KEYED = re.compile(r"hmac:[0-9a-f]{16}")


def plain_hash(content: bytes) -> str:
    """The name of a content in memory."""
    return f"sha256:{hashlib.sha256(content).hexdigest()[:16]}"


def content_id(tokens: list[int], prompt: int = 0) -> str:
    """Hash of tokens and of where the answer starts, `sha256:` and 16 hex digits: the id of a sample without another.

    No file holds it: see `IdKey`.
    """
    return plain_hash(f"{prompt}|{tokens}".encode())


@dataclass(frozen=True)
class IdKey:
    """What turns hashes of contents into ids that only its owner can make.

    Attributes:
        secret: at least 16 random bytes.
        path: the file that holds it, or will.
    """

    secret: bytes = field(repr=False)
    path: Path = field(compare=False)

    @classmethod
    def read(cls, path: str | Path) -> IdKey:
        """The key in a file; `ValueError` naming one that cannot be read or holds none."""
        path = Path(path).expanduser()
        try:
            secret = path.read_bytes().strip()
        except OSError as error:
            raise ValueError(f"cannot read id_key {path}: {error.strerror or error}") from None
        if len(secret) < 16:
            raise ValueError(f"id_key {path} holds no key: a key has at least 16 bytes")
        return cls(secret, path)

    @classmethod
    def new(cls, path: str | Path) -> IdKey:
        """A random key, which `made` writes."""
        return cls(secrets.token_hex(32).encode(), Path(path))

    @classmethod
    def made(cls, path: str | Path, secret: bytes | None = None) -> IdKey:
        """The key in a file, which is made for its owner alone if it is not there: random, or `secret`."""
        path = Path(path).expanduser()
        new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                new.unlink(missing_ok=True)
                with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                    file.write(secret or cls.new(path).secret)
                with suppress(FileExistsError):  # another process was faster
                    os.link(new, path)
                new.unlink()
        except OSError as error:
            if disk_full(error):
                new.unlink(missing_ok=True)
                raise DiskFullError(path) from None
            raise ValueError(f"cannot read id_key {path}: {error.strerror or error}") from None
        return cls.read(path)

    def keyed(self, text: str) -> str:
        """A text with every hash of a content in it made an id of this key; all else stays."""
        return PLAIN.sub(lambda found: self._id(found[0]), text)

    def keyed_values(self, value: Any) -> Any:
        """The same of plain JSON values."""
        text = json.dumps(value)
        return json.loads(self.keyed(text)) if PLAIN.search(text) else value

    def _id(self, plain: str) -> str:
        return f"hmac:{hmac.digest(self.secret, plain.encode(), 'sha256').hex()[:16]}"


_given: IdKey | None = None
_last: IdKey | None = None


def use_id_key(path: str | Path | None) -> None:
    """Write ids with the key in this file from now on, in this process; with `None` with the key beside each file.

    A file that is not there is made, with a random key and for its owner alone.

    Raises:
        ValueError: for a file that cannot be read or made, or holds less than 16 bytes.
    """
    global _given, _last
    _given = _last = None if path is None else IdKey.made(path)


@contextmanager
def id_key_kept_in(folder: str | Path) -> Iterator[None]:
    """As if the key in `folder` were given (`use_id_key`), if there is one and no other is."""
    global _given
    before = _given
    _given = before or key_in(folder)
    try:
        yield
    finally:
        _given = before


def given_key() -> IdKey | None:
    """The key of `use_id_key`."""
    return _given


def key_in(folder: str | Path) -> IdKey | None:
    """The key that is kept in `folder`, if there is one."""
    path = Path(folder).expanduser() / KEY_FILE
    return _remember(IdKey.read(path)) if path.is_file() else None


def key_for(folder: str | Path, *others: IdKey | None) -> IdKey:
    """The key of what is written into `folder`: the one that was given (`use_id_key`), that of the folder, the first of
    `others`, or a new one; of the last two the folder gets its copy."""
    if _given is not None:
        return _given
    other = next((key for key in others if key is not None), None)
    return key_in(folder) or _remember(IdKey.made(Path(folder) / KEY_FILE, None if other is None else other.secret))


def keys_beside(path: str | Path) -> tuple[IdKey, ...]:
    """The keys that ids in the file at `path` may be made with."""
    return tuple(key for key in (key_in(Path(path).expanduser().parent), _given) if key is not None)


def keyed_for(path: str | Path, values: Any, keys: Sequence[IdKey] = ()) -> Any:
    """Plain JSON values as they go into the file at `path`, with its key beside it: see `key_for`.

    Args:
        keys: of the ids among them that are keyed already.

    Raises:
        ValueError: for ids of another key than that of the folder.
    """
    text, folder = json.dumps(values), Path(path).expanduser().parent
    if not PLAIN.search(text) and not (keys and KEYED.search(text)):
        return values
    key = key_for(folder, *keys)
    if keys and KEYED.search(text) and key not in keys:
        raise ValueError(
            f"cannot write {path}: its ids are those of {keys[0].path}, and {key.path} is another key; "
            "choose another folder"
        )
    return key.keyed_values(values)


def as_written(have: Iterable[str], wanted: Sequence[str], keys: Sequence[IdKey]) -> list[str]:
    """The ids `wanted` as they stand in `have`: as they are, or made with one of the keys."""
    have = set(have)
    if not have.issuperset(wanted):
        for key in keys:
            keyed = [key.keyed(name) for name in wanted]
            if have.issuperset(keyed):
                return keyed
    return list(wanted)


def without_hashes(text: str) -> str:
    """An error as others may read it: hashes of contents as ids of the key that was used last."""
    return PLAIN.sub("(without an id)", text) if _last is None else _last.keyed(text)


def _remember(key: IdKey) -> IdKey:
    global _last
    _last = key
    return key

"""Access control: who a connection is, what an ACL says of it, and which ACLs may be written at all.

An identity is a pair (scheme, id). Every connection has ("ip", its address); `digest` credentials add to it. The
schemes are those that a 3.8 server offers unconfigured: world, auth, digest and ip.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntFlag

from .protocol import AclEntry, Code, ZooKeeperError

Identity = tuple[str, str]
Acl = tuple[AclEntry, ...]

_NUMBER = re.compile(r"[+-]?[0-9]{1,9}")


class Perm(IntFlag):
    READ = 1
    WRITE = 2
    CREATE = 4
    DELETE = 8
    ADMIN = 16


OPEN_ACL: Acl = (AclEntry(31, "world", "anyone"),)
READ_ONLY_ACL: Acl = (AclEntry(Perm.READ, "world", "anyone"),)


def digest_identity(credentials: bytes) -> Identity:
    """The identity that `user:password` proves: the user's name and the base64 of its SHA-1."""
    # Imported here: they cost a tenth of the whole start and most servers never see a password.
    import base64
    import hashlib

    text = credentials.decode("utf-8", "replace")
    proof = base64.b64encode(hashlib.sha1(text.encode()).digest()).decode()
    return "digest", f"{text.split(':', 1)[0]}:{proof}"


def permitted(entries: Acl, perm: int, identities: Iterable[Identity]) -> bool:
    """Whether one of the identities holds one of the permissions."""
    if entries is OPEN_ACL:
        return True
    granting = [entry for entry in entries if entry.perms & perm]
    return any(_is_world(entry) or any(_matches(entry, who) for who in identities) for entry in granting)


def require(entries: Acl, perm: int, identities: Iterable[Identity]) -> None:
    if not permitted(entries, perm, identities):
        raise ZooKeeperError(Code.NO_AUTH)


def resolve(entries: list[AclEntry], identities: Iterable[Identity]) -> Acl:
    """The ACL to store for the one a client sent: without duplicates, `auth` replaced by who the client is.

    Raises ZooKeeperError(INVALID_ACL) for an empty ACL, an unknown scheme or an id that its scheme can't read.
    """
    proven = [who for who in identities if who[0] == "digest"]
    resolved: list[AclEntry] = []
    for entry in dict.fromkeys(entries):
        if entry.scheme == "auth" and proven:
            resolved += [AclEntry(entry.perms, *who) for who in proven]
        elif _is_world(entry) or _is_readable(entry):
            resolved.append(entry)
        else:
            raise ZooKeeperError(Code.INVALID_ACL)
    if not resolved:
        raise ZooKeeperError(Code.INVALID_ACL)
    stored = tuple(resolved)
    return OPEN_ACL if stored == OPEN_ACL else stored


def without_proofs(entries: Acl) -> Acl:
    """The ACL as shown to someone who may read but not administer: digests are blanked."""
    return tuple(
        entry._replace(id=re.sub(":.*", ":x", entry.id or "")) if entry.scheme == "digest" else entry
        for entry in entries
    )


def _is_world(entry: AclEntry) -> bool:
    return entry.scheme == "world" and entry.id == "anyone"


def _is_readable(entry: AclEntry) -> bool:
    if entry.id is None:
        return False
    if entry.scheme == "digest":
        return len(entry.id.rstrip(":").split(":")) == 2
    return entry.scheme == "ip" and _network(entry.id) is not None


def _matches(entry: AclEntry, identity: Identity) -> bool:
    scheme, name = identity
    if entry.scheme != scheme or entry.id is None:
        return False
    return _in_network(name, entry.id) if scheme == "ip" else name == entry.id


def _in_network(address: str, expression: str) -> bool:
    network, host = _network(expression), _network(address)
    if network is None or host is None:
        return False
    value, bits = network
    return value >> (32 - bits) == host[0] >> (32 - bits)


def _network(expression: str) -> tuple[int, int] | None:
    """`a.b.c.d` or `a.b.c.d/bits` as (address, bits); None for anything else, IPv6 included, as in the real one."""
    address, slash, mask = expression.partition("/")
    numbers = [_number(part, 255) for part in address.split(".")]
    bits = _number(mask, 32) if slash else 32
    if len(numbers) != 4 or bits is None or None in numbers:
        return None
    value = 0
    for number in numbers:
        value = value << 8 | (number or 0)
    return value, bits


def _number(text: str, highest: int) -> int | None:
    if not _NUMBER.fullmatch(text) or not 0 <= int(text) <= highest:
        return None
    return int(text)

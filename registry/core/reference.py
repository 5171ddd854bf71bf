"""References to versions: `namespace/name[:tag | @number | @sha256:prefix][@{time}]`, also as a
`registry://` URL. Everything that becomes a path, a row or a journal key is validated here first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NoReturn

from registry.core.errors import InvalidReference

LATEST = "latest"
URL_SCHEME = "registry://"
MAX_PART = 128

_PART = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?")
_TAG = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_DIGEST_PREFIX = re.compile(r"sha256:([0-9a-f]{4,64})")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_MOMENT = re.compile(r"(?P<rest>.*)@\{(?P<time>[^{}]*)\}", re.DOTALL)


def shown(text: str, limit: int = 60) -> str:
    """Text from outside, safe for one line of a terminal: escaped and cut."""
    escaped = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


@dataclass(frozen=True, slots=True)
class Reference:
    """What a user wrote to name a version; `resolve` of the catalog finds the version.

    At most one of `tag`, `number` and `digest` is set; none of them means the latest version.

    Attributes:
        digest: a prefix of the manifest digest, 4 to 64 hex digits.
        moment: the tag (or latest) as it was at this time, with a time zone.
    """

    namespace: str
    name: str
    tag: str | None = None
    number: int | None = None
    digest: str | None = None
    moment: datetime | None = None

    @property
    def artifact(self) -> str:
        return f"{self.namespace}/{self.name}"

    def __str__(self) -> str:
        text = self.artifact
        if self.tag is not None:
            text += f":{self.tag}"
        elif self.number is not None:
            text += f"@{self.number}"
        elif self.digest is not None:
            text += f"@sha256:{self.digest}"
        return text if self.moment is None else f"{text}@{{{self.moment.isoformat()}}}"


def parse_reference(text: str) -> Reference:
    """Reads a reference.

    Raises:
        InvalidReference: names the part that is wrong and what it must look like.
    """
    if not isinstance(text, str):
        raise InvalidReference(f"a reference is text such as 'walk/perturb:prod', not {type(text).__name__}")
    if len(text) > 4 * MAX_PART:
        raise InvalidReference(f"reference '{shown(text)}' has {len(text)} characters; {4 * MAX_PART} is the most")
    rest = text.removeprefix(URL_SCHEME)
    moment: datetime | None = None
    if match := _MOMENT.fullmatch(rest):
        rest, moment = match["rest"], parse_moment(match["time"], text)
    tag: str | None = None
    number: int | None = None
    digest: str | None = None
    if "@" in rest:
        rest, _, pin = rest.partition("@")
        if _NUMBER.fullmatch(pin):
            number = int(pin)
        elif match := _DIGEST_PREFIX.fullmatch(pin):
            digest = match[1]
        else:
            _refuse(text, f"'@{shown(pin)}' is neither a number from 1 (@3) nor a digest (@sha256: and 4 to 64 hex)")
        if ":" in rest:
            _refuse(text, "it has both a tag and a pin; give one of them")
        if moment is not None:
            _refuse(text, "a pinned version does not change, so it takes no @{time}")
    elif ":" in rest:
        rest, _, tag = rest.partition(":")
        check_tag(tag, what=text)
    namespace, name = parse_artifact(rest, what=text)
    return Reference(namespace, name, None if tag == LATEST else tag, number, digest, moment)


def parse_artifact(text: str, *, what: str | None = None) -> tuple[str, str]:
    """Reads `namespace/name`.

    Raises:
        InvalidReference
    """
    what = text if what is None else what
    parts = text.split("/")
    if len(parts) != 2:
        _refuse(what, f"expected namespace/name with one '/', found {len(parts) - 1}")
    for part, role in zip(parts, ("namespace", "name"), strict=True):
        if len(part) > MAX_PART:
            _refuse(what, f"the {role} has {len(part)} characters; {MAX_PART} is the most")
        if not _PART.fullmatch(part) or ".." in part:
            _refuse(
                what,
                f"the {role} '{shown(part)}' must be of a-z, 0-9, '.', '_' and '-', begin and end with "
                "a letter or digit, and have no '..'",
            )
    return parts[0], parts[1]


def check_tag(tag: str, *, what: str | None = None) -> str:
    """The tag itself where it is well formed.

    Raises:
        InvalidReference
    """
    what = tag if what is None else what
    if len(tag) > MAX_PART:
        _refuse(what, f"the tag has {len(tag)} characters; {MAX_PART} is the most")
    if not _TAG.fullmatch(tag) or ".." in tag:
        _refuse(what, f"the tag '{shown(tag)}' must be of letters, digits, '.', '_' and '-'")
    if tag.isdigit():
        _refuse(what, f"the tag {tag!r} is digits only; write @{tag} for version {tag}")
    return tag


def check_new_tag(tag: str) -> str:
    """The tag where it may be set by a user: `latest` is derived and may not.

    Raises:
        InvalidReference
    """
    if check_tag(tag) == LATEST:
        raise InvalidReference("the tag 'latest' always means the highest version and cannot be set; choose another")
    return tag


def parse_push_target(text: str) -> tuple[str, str, str | None]:
    """Reads what a push may be given: `namespace/name` or `namespace/name:tag`.

    Returns:
        namespace, name and the tag to move, if one is given.

    Raises:
        InvalidReference: also for a pin, a time, or the tag `latest`.
    """
    reference = parse_reference(text)
    if reference.number is not None or reference.digest is not None or reference.moment is not None:
        raise InvalidReference(f"cannot push to '{shown(text)}': a push makes a new version; give namespace/name[:tag]")
    if text.removeprefix(URL_SCHEME).endswith(f":{LATEST}"):
        check_new_tag(LATEST)
    return reference.namespace, reference.name, reference.tag


def parse_moment(text: str, what: str) -> datetime:
    """Reads an ISO 8601 date or time; UTC unless it says otherwise, a bare date is 00:00.

    Raises:
        InvalidReference
    """
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):  # an offset can lead out of the years 1 to 9999
        _refuse(what, f"'{shown(text)}' is not a date or time such as 2026-11-01 or 2026-11-01T12:30Z")


def _refuse(what: str, why: str) -> NoReturn:
    raise InvalidReference(f"invalid reference '{shown(what)}': {why}")

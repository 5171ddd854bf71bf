"""References, valid ones with what they mean and refused ones with the reason."""

from __future__ import annotations

from typing import Any

from registry.core.reference import parse_reference
from tests.vectors.tensor_bytes import hexes


def reference_vectors() -> dict[str, Any]:
    digits = hexes("manifest")
    valid = [
        "walk/perturb",
        "registry://walk/perturb",
        "walk/perturb:prod",
        "registry://walk/perturb:prod",
        "walk/perturb:latest",
        "walk/perturb@3",
        "walk/perturb@999999999999999999",
        "walk/perturb@sha256:ab12",
        f"walk/perturb@sha256:{digits}",
        "walk/perturb:prod@{2026-11-01}",
        "walk/perturb@{2026-11-01}",
        "walk/perturb:latest@{2026-11-01T12:30}",
        "walk/perturb:prod@{2026-11-01T12:30:00Z}",
        "walk/perturb:prod@{2026-11-01T12:30:00.250+02:00}",
        "walk/perturb:prod@{2026-11-01 12:30:00-05:00}",
        "0/0",
        "a.b-c_d/e.f-g_h:V1.0-rc_2",
        "walk/perturb:_",
        "walk/perturb:1a",
        f"{'n' * 128}/{'m' * 128}:{'t' * 128}",
    ]
    invalid = [
        ("", "no name"),
        ("perturb", "no namespace"),
        ("a/b/c", "two slashes"),
        ("/perturb", "an empty namespace"),
        ("walk/", "an empty name"),
        ("walk//perturb", "two slashes"),
        ("../etc", "dots for a namespace"),
        ("walk/..", "dots for a name"),
        ("walk/a..b", "two dots in a row"),
        ("walk/.hidden", "a dot first"),
        ("walk/perturb.", "a dot last"),
        ("walk/-x", "a dash first"),
        ("Walk/perturb", "upper case"),
        ("walk/Perturb", "upper case"),
        ("walk/pertürb", "a letter beyond ASCII"),
        ("walk/per turb", "a space"),
        (" walk/perturb", "a space"),
        ("walk/perturb\n", "a control character"),
        ("walk/per\x00turb", "a control character"),
        ("walk/per\x1b[31mturb", "a control character"),
        ("walk\\perturb", "a backslash"),
        (f"walk/{'x' * 129}", "129 letters"),
        (f"walk/{'x' * 300}", "300 letters"),
        (f"walk/perturb:{'x' * 129}", "129 letters in a tag"),
        ("x" * 600, "too long altogether"),
        ("walk/perturb:", "an empty tag"),
        ("walk/perturb:12", "a tag of digits only"),
        ("walk/perturb:a..b", "two dots in a row"),
        ("walk/perturb:.a", "a dot first"),
        ("walk/perturb:a b", "a space"),
        ("walk/perturb:prod\n", "a control character"),
        ("walk/perturb:a/b", "a slash in a tag"),
        ("walk/perturb:a:b", "two tags"),
        ("walk/perturb@", "an empty pin"),
        ("walk/perturb@0", "numbers begin at 1"),
        ("walk/perturb@-1", "a negative number"),
        ("walk/perturb@01", "a leading zero"),
        ("walk/perturb@1.0", "not a whole number"),
        ("walk/perturb@1000000000000000000", "19 digits"),
        ("walk/perturb@\u0663", "a digit beyond ASCII"),
        ("walk/perturb@prod", "a tag after @"),
        ("walk/perturb@sha256:abc", "three hex digits, four is the least"),
        ("walk/perturb@sha256:", "no hex digits"),
        ("walk/perturb@sha256:ABCD", "upper case"),
        ("walk/perturb@sha256:xyzw", "not hex digits"),
        (f"walk/perturb@sha256:{digits}0", "65 hex digits"),
        ("walk/perturb@sha1:abcd", "another algorithm"),
        ("walk/perturb:prod@3", "a tag and a number"),
        ("walk/perturb@3@{2026-11-01}", "a number and a time"),
        ("walk/perturb@sha256:ab12@{2026-11-01}", "a digest and a time"),
        ("walk/perturb:prod@{}", "an empty time"),
        ("walk/perturb:prod@{yesterday}", "no time"),
        ("walk/perturb:prod@{2026-13-01}", "no such month"),
        ("walk/perturb:prod@{2026-11-01T25:00}", "no such hour"),
        ("walk/perturb:prod@{12:30}", "a time without a date"),
        ("walk/perturb:prod@{0001-01-01T00:00+23:00}", "before the year 1 in UTC"),
        ("walk/perturb:prod@{9999-12-31T23:00-23:00}", "after the year 9999 in UTC"),
        ("walk/perturb:prod@{2026-11-01}x", "something after the time"),
        ("walk/perturb:prod@{2026-11-01}\n", "a line feed after the time"),
        ("walk/perturb:prod@{2026-11-01}@{2026-11-02}", "two times"),
        ("REGISTRY://walk/perturb", "the scheme in upper case"),
        ("https://walk/perturb", "another scheme"),
        ("registry://registry://walk/perturb", "the scheme twice"),
    ]
    cases = []
    for text in valid:
        found = parse_reference(text)
        moment = None if found.moment is None else found.moment.isoformat()
        cases.append(
            {
                "text": text,
                "namespace": found.namespace,
                "name": found.name,
                "tag": found.tag,
                "number": found.number,
                "digest": found.digest,
                "moment": moment,
            }
        )
    pushes = [
        ("walk/perturb@3", "a number"),
        ("walk/perturb@sha256:ab12", "a digest"),
        ("walk/perturb:prod@{2026-11-01}", "a time"),
        ("walk/perturb:latest", "latest is derived"),
        ("registry://walk/perturb:latest", "latest is derived"),
    ]
    return {
        "valid": cases,
        "invalid": [{"text": text, "reason": reason} for text, reason in invalid],
        "not_to_push_to": [{"text": text, "reason": reason} for text, reason in pushes],
    }

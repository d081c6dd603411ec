"""What a web server tells of a verdict: header fields, and the answer to whoever is refused.

A1  Every answer has ``RateLimit-Policy`` and ``RateLimit``; a refusal also ``Retry-After``, and
    a problem document (RFC 9457) that names the limit. Of shadows nothing is told.
A2  A subject made of what a client sent is percent-encoded, and cut to a bounded length with
    a hash: any text is a subject, and no two of them are the same by accident.

Fields: draft-ietf-httpapi-ratelimit-headers. The quota ``q`` is the burst, and the window ``w``
the time in which so much comes back; ``r`` is what remains, ``t`` the seconds until more does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from urllib.parse import quote

import msgspec

from ...schemas.limits import Limit, Verdict

__all__ = ["PROBLEM_TYPE", "fields_of", "problem_of", "subject_of"]

PROBLEM_TYPE = "application/problem+json"
_QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
_SUBJECT_MAX = 200


def subject_of(text: str) -> str:
    """A subject for any text; ``-`` for none."""
    quoted = quote(text, safe="-._~@/:", errors="replace") or "-"
    if len(quoted) <= _SUBJECT_MAX:
        return quoted
    return quoted[:_SUBJECT_MAX] + "~" + hashlib.sha256(quoted.encode()).hexdigest()[:32]


def fields_of(limits: Iterable[Limit], verdict: Verdict) -> dict[str, str]:
    """The header fields that tell of it."""
    policies = [
        f'"{each.name}";q={each.burst};w={max(1, math.ceil(each.burst * each.per / each.rate))}'
        for each in limits
        if not each.shadow
    ]
    if not policies:
        return {}
    wait_ms = verdict.reset_after_ms if verdict.allowed else verdict.retry_after_ms
    left = verdict.remaining if verdict.allowed else 0
    fields = {
        "RateLimit-Policy": ", ".join(policies),
        "RateLimit": f'"{verdict.limit}";r={left};t={math.ceil(wait_ms / 1000)}',
    }
    if not verdict.allowed:
        fields["Retry-After"] = str(max(1, math.ceil(wait_ms / 1000)))
    return fields


def problem_of(verdict: Verdict) -> bytes:
    """The body of a refusal."""
    return msgspec.json.encode(
        {
            "type": _QUOTA_EXCEEDED,
            "title": "Request cannot be satisfied as assigned quota has been exceeded",
            "status": 429,
            "detail": f"limit {verdict.limit} is reached, "
            f"try again in {max(1, math.ceil(verdict.retry_after_ms / 1000))} s",
            "violated-policies": [verdict.limit],
        }
    )

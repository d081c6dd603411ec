"""Settings that an application gives in its code, checked like those from outside.

They are the settings of a node that got some, and nothing from outside is added then: no
environment, no file. A namespace alone is a default for whatever comes from outside.
"""

from __future__ import annotations

import msgspec

from ..schemas.errors import ConfigError
from ..schemas.settings import Secret, Settings
from ..schemas.settings_names import FIELDS
from ..schemas.settings_sources import Resolved, resolve

__all__ = ["in_code", "with_namespace"]

_ORIGIN = "the code"


def in_code(namespace: str | None, settings: Settings | None) -> Resolved:
    """These settings; a namespace among them goes before ``namespace``.

    Raises:
        ConfigError: one cannot be used.
    """
    given = {} if settings is None else _given(settings)
    if namespace is not None:
        given.setdefault("node.namespace", namespace)
    try:
        resolved = resolve(file=None, environ={}, flags=given, read_secret=lambda _: None)
    except ConfigError as error:
        raise ConfigError(
            setting=error.setting,
            value=error.value,
            origin=_ORIGIN,
            problem=error.problem,
            fix=error.fix,
        ) from None
    origins = {
        name: "default" if origin == "default" else _ORIGIN
        for name, origin in resolved.origins.items()
    }
    warnings = tuple(msgspec.structs.replace(w, origin=_ORIGIN) for w in resolved.warnings)
    return Resolved(settings=resolved.settings, origins=origins, warnings=warnings)


def with_namespace(resolved: Resolved, in_code: Resolved) -> Resolved:
    """These settings, with the namespace given in code if nobody has set another."""
    name = "node.namespace"
    if resolved.origins.get(name, "default") != "default":
        return resolved
    namespace, origin = in_code.settings.node.namespace, in_code.origins[name]
    node = msgspec.structs.replace(resolved.settings.node, namespace=namespace)
    settings = msgspec.structs.replace(resolved.settings, node=node)
    origins = {**resolved.origins, name: origin}
    return msgspec.structs.replace(resolved, settings=settings, origins=origins)


def _given(settings: Settings) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, field in FIELDS.items():
        value = getattr(getattr(settings, field.section), field.leaf)
        if value != field.default:
            found[name] = value.reveal() if isinstance(value, Secret) else value
    return found

"""Files with a secret that other users of the machine may read or write.

Looked at when a node starts, and by `forebay config check`: the file of a password, the
configuration file if a password stands in it, the token of the endpoint, and the key of a
certificate. What is found is a warning, since container engines mount secrets so.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..coordinator.files import open_to_others
from ..schemas.settings_names import plainly, shown
from ..schemas.settings_sources import Resolved, SettingWarning

__all__ = ["exposed_secrets"]


def exposed_secrets(resolved: Resolved) -> Iterator[SettingWarning]:
    """A warning for each such file."""
    settings = resolved.settings
    paths = {
        **resolved.secret_files,
        "http.token_file": settings.http.token_file,
        "valkey.tls_key_file": settings.valkey.tls_key_file,
    }
    for name, path in paths.items():
        if path and (may := open_to_others(path)):
            section, _, leaf = name.partition(".")
            place = plainly(path)
            yield SettingWarning(
                setting=name,
                value=shown(name, getattr(getattr(settings, section), leaf)),
                origin=resolved.origins.get(name, "default"),
                problem=f"other users of this machine may {may} {place}",
                fix=f"chmod o-rw {place}, or mount it with such a mode",
            )

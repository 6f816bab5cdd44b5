"""What may be a name, and how a concrete model id is made from one.

Fails with ``InvalidArgument`` that says what was found and what is allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha1
from typing import Any, Final, Literal

from mesh.core.errors import InvalidArgument

Source = Literal["isvc", "ksp"]

# Ids are keys in the store and values of headers: 512 characters keep both far from their limits.
MODEL_ID_MAX_CHARS: Final = 512
# A Kubernetes object name: an RFC 1123 subdomain.
_SUBDOMAIN_MAX_CHARS: Final = 253
_LABEL_MAX_CHARS: Final = 63
_SUBDOMAIN: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
# C0, DEL and C1 controls, and the surrogates that no UTF-8 can carry.
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def concrete_model_id(name: str, source: Source, predictor_spec: Mapping[str, Any]) -> str:
    """``<name>__<source>-<10 hex>``, as ModelMesh names what a resource stands for.

    The hash is the first five bytes of the SHA-1 of the spec as canonical JSON (sorted keys, no
    blanks), so an equal spec is the same model however it was written.
    """
    canonical = json.dumps(
        predictor_spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    digest = sha1(canonical.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()
    return f"{name}__{source}-{digest[:10]}"


def is_resource_name(name: str) -> bool:
    """Whether Kubernetes allows ``name`` for an object."""
    return len(name) <= _SUBDOMAIN_MAX_CHARS and _SUBDOMAIN.fullmatch(name) is not None


def check_resource_name(name: object, where: str) -> str:
    """``name`` as Kubernetes allows it for an object. ``where`` is the field's path."""
    if not isinstance(name, str):
        raise InvalidArgument(f"{where}: expected a string; found {name!r:.80}")
    if not is_resource_name(name):
        raise InvalidArgument(
            f"{where}: expected lower-case letters, digits, '-' and '.', starting and ending with "
            f"a letter or digit, at most {_SUBDOMAIN_MAX_CHARS} characters; found {_show(name)}"
        )
    return name


def check_namespace(name: object, where: str) -> str:
    """``name`` as Kubernetes allows it for a namespace (a DNS label)."""
    if not isinstance(name, str):
        raise InvalidArgument(f"{where}: expected a string; found {name!r:.80}")
    if len(name) > _LABEL_MAX_CHARS or not _LABEL.fullmatch(name):
        raise InvalidArgument(
            f"{where}: expected lower-case letters, digits and '-', starting and ending with a "
            f"letter or digit, at most {_LABEL_MAX_CHARS} characters; found {_show(name)}"
        )
    return name


def check_model_id(model_id: str, where: str = "model id") -> str:
    """An id that a client registers: anything printable of 1 to 512 characters."""
    if not model_id:
        raise InvalidArgument(f"{where}: expected 1 to {MODEL_ID_MAX_CHARS} characters; found none")
    if len(model_id) > MODEL_ID_MAX_CHARS:
        raise InvalidArgument(
            f"{where}: expected at most {MODEL_ID_MAX_CHARS} characters; found {len(model_id)}"
        )
    if found := _UNPRINTABLE.search(model_id):
        raise InvalidArgument(
            f"{where}: control characters are not allowed; found U+{ord(found.group()):04X} at "
            f"character {found.start()}"
        )
    return model_id


def _show(name: str) -> str:
    """A name short enough for an error message."""
    return repr(name) if len(name) <= 80 else f"{name[:60]!r}... ({len(name)} characters)"

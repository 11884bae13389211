"""TLS certificates of clusters, and a warning about unprotected schedulers."""

import contextlib
import importlib.util
import ipaddress
import logging
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ocelot_em.errors import MissingDependencyError
from ocelot_em.run.connect import wait_for_file

log = logging.getLogger(__name__)

CERTIFICATES_TIMEOUT_SECONDS = 300.0
"""Timeout for the certificates of a run to appear in the folder shared by its tasks."""

_ROLES = "client", "scheduler", "worker"

_CERTIFICATE, _KEY = "certificate.pem", "key.pem"


def security_of_run() -> Any:
    """Return certificates for all roles: those in Dask's configuration, or temporary ones."""
    configured = configured_security()
    return _temporary() if configured is None else configured


def configured_security() -> Any | None:
    """Return the certificates in Dask's configuration, ``distributed.comm.tls``, if complete."""
    from distributed.security import Security

    security = Security(require_encryption=True)
    paths = [security.get_tls_config_for_role(role).get("cert") for role in _ROLES]
    return security if all(paths) else None


def share_certificates(folder: Path, *, creates: bool) -> dict[str, str]:
    """Share certificates between the processes of a run through a folder for this user only.

    One process ``creates`` them, the others wait. Return Dask configuration with their paths, which
    is empty if Dask is already configured.
    """
    if configured_security() is not None:
        return {}
    if creates:
        created = _temporary()
        folder.mkdir(mode=0o700)
        pems = {_KEY: created.tls_scheduler_key, _CERTIFICATE: created.tls_ca_file}
        for name, content in pems.items():
            staged = folder / f"{name}.new"
            staged.touch(mode=0o600, exist_ok=False)
            staged.write_text(content)
            staged.rename(folder / name)
    problem = (
        f"tls: no certificates in {folder} after {CERTIFICATES_TIMEOUT_SECONDS:.0f} s; all tasks "
        "of a job need access to its working folder"
    )
    wait_for_file(folder / _CERTIFICATE, CERTIFICATES_TIMEOUT_SECONDS, problem)
    prefix = "distributed.comm.tls"
    settings = {f"{prefix}.ca-file": str(folder.absolute() / _CERTIFICATE)}
    for role in _ROLES:
        settings[f"{prefix}.{role}.cert"] = str(folder.absolute() / _CERTIFICATE)
        settings[f"{prefix}.{role}.key"] = str(folder.absolute() / _KEY)
    return settings


def remove_certificates(folder: Path) -> None:
    """Remove the certificates that :func:`share_certificates` created."""
    for name in (_CERTIFICATE, _KEY):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _temporary() -> Any:
    from distributed.security import Security

    if importlib.util.find_spec("cryptography") is None:
        raise MissingDependencyError(
            "tls: temporary certificates need cryptography: pip install 'ocelot-em[cluster]'; or "
            "set the paths of your own in Dask's configuration, under distributed.comm.tls"
        )
    return Security.temporary()


def warn_if_open(address: str) -> None:
    """Warn if a scheduler can be reached from other hosts without certificates."""
    parts = urlsplit(address)
    if parts.scheme in ("tls", "inproc", "ws", "wss") or is_loopback(parts.hostname or ""):
        return
    log.warning(
        "the Dask scheduler at %s is not protected: anyone who can reach it can run code as you, "
        "on the scheduler and all workers; use --tls, or a trusted network",
        address,
    )


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is reachable only on its host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

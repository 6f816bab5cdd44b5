"""S3 and what speaks like it: a location → a store of ``obstore``'s. Does not connect yet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from obstore.store import S3Store

from mesh.core.errors import LoadFailed
from puller.location import S3Credentials, S3Location
from puller.object_store import ERRORS, RETRY, client_options, settings_wrong
from puller.settings import PullerSettings

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Credential


def open_s3(location: S3Location, settings: PullerSettings) -> S3Store:
    endpoint = location.endpoint or f"https://s3.{location.region}.amazonaws.com"
    credentials = location.credentials
    config: S3Config = {
        "endpoint": endpoint,
        "aws_endpoint_url_s3": endpoint,
        "region": location.region,
        "virtual_hosted_style_request": False,
        "skip_signature": credentials.anonymous,
    }
    client = client_options(settings, endpoint, location.certificate_pem)
    try:
        if credentials.access_key_id:
            return S3Store(
                location.bucket,
                config=config,
                client_options=client,
                retry_config=RETRY,
                credential_provider=lambda: _static(credentials),
            )
        if not credentials.anonymous:
            config["web_identity_token_file"] = credentials.web_identity_token_file
            config["role_arn"] = credentials.role_arn
            config["role_session_name"] = credentials.role_session_name or "modelmesh-py"
        return S3Store(location.bucket, config=config, client_options=client, retry_config=RETRY)
    except ERRORS:
        raise settings_wrong(location) from None


def _static(credentials: S3Credentials) -> S3Credential:
    return {
        "access_key_id": credentials.access_key_id,
        "secret_access_key": credentials.secret_access_key,
        "token": credentials.session_token or None,
        "expires_at": None,
    }


def read_certificate(location: S3Location) -> str:
    """The PEM of ``certificate_file``: read anew for each fetch, so that a renewed one counts."""
    if not location.certificate_file:
        return ""
    try:
        return Path(location.certificate_file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadFailed(
            f"AWS_CA_BUNDLE {location.certificate_file!r} cannot be read: {error}"
        ) from None

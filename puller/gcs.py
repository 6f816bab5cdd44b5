"""Google Cloud Storage: a location → a store of ``obstore``'s. Blocks (reads credential files).

A service account's key signs each token itself, so ``token_uri`` of KServe's entries is not asked
(and is refused where it is not Google's, see ``puller.resolve_stores``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
from obstore.store import GCSStore

from puller.location import GcsLocation
from puller.object_store import ERRORS, RETRY, client_options, settings_wrong
from puller.settings import PullerSettings

if TYPE_CHECKING:
    from obstore.store import GCSConfig


def open_gcs(location: GcsLocation, settings: PullerSettings) -> GCSStore:
    credentials = location.credentials
    config: GCSConfig = {"skip_signature": credentials.anonymous}
    if location.endpoint:
        config["base_url"] = location.endpoint
    if credentials.private_key:
        config["service_account_key"] = orjson.dumps(
            {
                "type": "service_account",
                "client_email": credentials.client_email,
                # Kubernetes manifests often carry the line breaks as two characters.
                "private_key": credentials.private_key.replace("\\n", "\n"),
                "private_key_id": credentials.private_key_id,
            }
        ).decode()
    elif credentials.credentials_file:
        config["application_credentials"] = credentials.credentials_file
    client = client_options(settings, location.endpoint, location.certificate_pem)
    try:
        return GCSStore(location.bucket, config=config, client_options=client, retry_config=RETRY)
    except ERRORS:
        raise settings_wrong(location) from None

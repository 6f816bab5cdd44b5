"""Azure Blob Storage: a location → a store of ``obstore``'s. Does not connect yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obstore.store import AzureStore

from puller.location import AzureLocation
from puller.object_store import ERRORS, RETRY, client_options, settings_wrong
from puller.settings import PullerSettings

if TYPE_CHECKING:
    from obstore.store import AzureConfig


def open_azure(location: AzureLocation, settings: PullerSettings) -> AzureStore:
    credentials = location.credentials
    config: AzureConfig = {
        "account_name": location.account,
        "endpoint": location.where,
        "skip_signature": credentials.anonymous,
        "use_azure_cli": False,
    }
    if credentials.account_key:
        config["account_key"] = credentials.account_key
        config["credential_type"] = "access_key"
    elif credentials.shared_access_signature:
        config["sas_key"] = credentials.shared_access_signature
        config["credential_type"] = "sas_token"
    elif not credentials.anonymous:
        config["client_id"] = credentials.client_id
        config["tenant_id"] = credentials.tenant_id
        if credentials.client_secret:
            config["client_secret"] = credentials.client_secret
            config["credential_type"] = "client_secret"
        else:
            config["federated_token_file"] = credentials.federated_token_file
            config["credential_type"] = "workload_identity"
        if credentials.authority:
            config["authority_host"] = credentials.authority
    client = client_options(settings, location.where, location.certificate_pem)
    try:
        return AzureStore(location.bucket, config=config, client_options=client, retry_config=RETRY)
    except ERRORS:
        raise settings_wrong(location) from None

"""Tenants, their projects and keys, the operator's platform keys, and authentication."""

from serve.tenants.key_hash import server_secret
from serve.tenants.keys import KEY_PREFIX, SCOPES, ApiKey, Keys, Principal
from serve.tenants.platform_keys import PLATFORM_PREFIX, Operator, PlatformKey, PlatformKeys
from serve.tenants.projects import Project, Projects
from serve.tenants.tables import keys_table, tenants_table
from serve.tenants.tenants import Tenant, Tenants

__all__ = [
    "KEY_PREFIX",
    "PLATFORM_PREFIX",
    "SCOPES",
    "ApiKey",
    "Keys",
    "Operator",
    "PlatformKey",
    "PlatformKeys",
    "Principal",
    "Project",
    "Projects",
    "Tenant",
    "Tenants",
    "keys_table",
    "server_secret",
    "tenants_table",
]

"""API keys of the endpoint; they can be added and revoked while it runs.

key, secret = add_key(keys_file(home), "alice", Limits(requests_per_minute=60))    # the secret is not stored
"""

from llm_ray.conf.serve import Limits
from llm_ray.serve.gateway.protect.keys import (
    USUAL_SCOPES,
    Key,
    Scope,
    add_key,
    import_keys,
    keys_file,
    list_keys,
    new_secret,
    revoke_key,
    set_scopes,
)

__all__ = [
    "USUAL_SCOPES",
    "Key",
    "Limits",
    "Scope",
    "add_key",
    "import_keys",
    "keys_file",
    "list_keys",
    "new_secret",
    "revoke_key",
    "set_scopes",
]

"""The Hugging Face Hub: models by name are found and downloaded, names are pinned to commits, and a
student is uploaded. All of it goes through ``huggingface_hub``, with its cache and its variables
(``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``).
"""

from eopd.hub.commits import cached_commit, find_commit, require_commit
from eopd.hub.models import cached_directory, model_directory, require_cached_directory

__all__ = [
    "cached_commit",
    "cached_directory",
    "find_commit",
    "model_directory",
    "require_cached_directory",
    "require_commit",
]

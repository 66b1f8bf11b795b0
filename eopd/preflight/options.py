"""Native options of the engines, checked by name before an engine starts."""

import ast
import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from eopd.config import ConfigError


def require_vllm_options(key: str, options: Mapping[str, object]) -> None:
    """Compare ``options`` with the names in the installed vLLM's source (0.32.0): importing it would take seconds.

    Raises:
        ConfigError: it has no such option.
    """
    spec = importlib.util.find_spec("vllm")
    if not options or spec is None or spec.origin is None:  # a cluster's driver may be without
        return
    tree = ast.parse((Path(spec.origin).parent / "engine" / "arg_utils.py").read_text(encoding="utf-8"))
    kinds = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("EngineArgs")]
    fields = [node.target for kind in kinds for node in kind.body if isinstance(node, ast.AnnAssign)]
    known = [field.id for field in fields if isinstance(field, ast.Name)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{key}: vLLM has no option {name}{hint}")

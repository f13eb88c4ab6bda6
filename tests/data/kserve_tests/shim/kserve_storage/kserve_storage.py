"""
KServe's module of this name. Its tests import two helpers from it that are not public; those that call them are not
run.
"""

from kserve_pvc.kserve import Storage

__all__ = ["Storage"]

_should_download = _parse_patterns_from_env = None

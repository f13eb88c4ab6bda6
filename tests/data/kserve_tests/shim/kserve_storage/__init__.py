"""
Stands in for KServe's package of this name while KServe's own tests run: what is public is ours.
"""

from kserve_pvc.kserve import Storage

__all__ = ["Storage"]

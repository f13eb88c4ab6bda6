"""
KServe integration: functions over plain dictionaries that let InferenceServices and pods mount a shared volume.
"""

# As in the package above: type checkers see the names, and modules are imported on first use.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from kserve_pvc.kserve._manifests import mutate_pod, share_volume
    from kserve_pvc.kserve._policy import Policy, Rule, read_policy
    from kserve_pvc.kserve._storage import Storage
else:

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})


_HOMES = {
    "Policy": "_policy",
    "Rule": "_policy",
    "Storage": "_storage",
    "mutate_pod": "_manifests",
    "read_policy": "_policy",
    "share_volume": "_manifests",
}
__all__ = ["Policy", "Rule", "Storage", "mutate_pod", "read_policy", "share_volume"]

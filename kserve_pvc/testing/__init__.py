"""
The contract of a backend as tests, for the backends of this package and for those of other distributions.

This is the only part of the package that needs pytest.
"""

import pytest

# So that a failure shows the compared values, as in a test of one's own.
for _module in ("_backends", "_base", "_downloads", "_listing", "_processes", "_reading", "_refusals", "_remote"):
    pytest.register_assert_rewrite(f"{__name__}.{_module}")

from kserve_pvc.testing._conformance import BackendConformance  # noqa: E402
from kserve_pvc.testing._remote import Remote  # noqa: E402

__all__ = ["BackendConformance", "Remote"]

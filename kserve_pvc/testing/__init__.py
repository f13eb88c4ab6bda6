"""
What a back end has to do, as tests that every back end runs, ours and those of others.

It needs pytest, which nothing else in this package does.
"""

import pytest

# So that a failure shows what was compared, as in a test of one's own.
pytest.register_assert_rewrite("kserve_pvc.testing._conformance")

from kserve_pvc.testing._conformance import BackendConformance, Remote  # noqa: E402

__all__ = ["BackendConformance", "Remote"]

"""
The conformance suite: a pytest class that reads through a backend what was put into a real service by other means.

Every object is put there without the backend under test. Most are read twice: through the backend alone, and through a
`ModelStore` that has to end up with exactly the same bytes.
"""

from __future__ import annotations

from kserve_pvc.testing._downloads import DownloadConformance
from kserve_pvc.testing._listing import ListingConformance
from kserve_pvc.testing._reading import ReadingConformance
from kserve_pvc.testing._refusals import RefusalConformance


class BackendConformance(ListingConformance, ReadingConformance, RefusalConformance, DownloadConformance):
    """
    The tests of every backend. Subclass it, set `backend`, and provide a fixture `remote`.

    The attributes below declare what a service does not support; the tests that need it are skipped and name them.

    Args:
        backend: The factory under test. Other processes import it by its name, so it must be a class or function of an
            importable module.
        has_trees: A URI may name many objects. Otherwise every model is one object.
        has_single_objects: A URI may name one object.
        has_empty_objects: The service can store empty objects.
        can_pin: A replaced object is never read as the listed one.
        has_versions: The service keeps replaced objects readable, so that a change during a download is not a failure.
        is_shared: Other processes on this machine reach the service with the same options.
        cannot_hold: The ids of `ODD_NAMES` and `HOSTILE_NAMES` that the service cannot store, each with the reason.
        many_files: The number of small files in the longest listing. 0 skips the test.
        big_bytes: The size of the largest file.
        unreachable_seconds: The time limit for the error of an unreachable service.
        patience_seconds: The time limit for abandoned threads and descriptors to end.
        log_level: The lowest level of log records that are searched for secrets. Some SDKs log whole requests at DEBUG.
        secrets: Further values among the options that must never be shown, besides those with the name of a secret.
    """

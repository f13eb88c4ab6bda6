"""
The defaults of arguments.

They are apart from the code that uses them, so that a signature shows them without loading that code.
"""

from __future__ import annotations

# Seconds to wait for another downloader. Long enough for hundreds of gigabytes, short enough to show up in monitoring.
TIMEOUT = 3600.0

# The most bytes per stream that are fetched again after a process was killed.
PART_BYTES = 64 * 1024 * 1024
# The most streams at once; a transfer begins with few and measures how many help.
MAX_WORKERS = 32
# How long a range may bring no byte before it is requested again on another connection, and how long it is retried.
STALL_SECONDS = 30.0
RETRY_SECONDS = 300.0

# How long discarded files stay intact for readers that have them open without a lease.
TRASH_SECONDS = 300.0

# Seconds that a doctor waits for its peer.
DOCTOR_TIMEOUT = 60.0

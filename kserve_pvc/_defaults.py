"""
What a call does unless it is told otherwise.

These stand apart from the code that they steer, so that a signature shows them and nobody has to load that code.
"""

from __future__ import annotations

# Seconds to wait for another downloader. Long enough for hundreds of gigabytes, short enough to show up in monitoring.
TIMEOUT = 3600.0

# The most that a killed process costs per stream in bytes fetched again.
PART_BYTES = 64 * 1024 * 1024
# The most streams at once; a transfer begins with few and finds out how many are worth while.
MAX_WORKERS = 32
# After how long without a byte a range is asked for again on another connection, and how long it is tried in all.
STALL_SECONDS = 30.0
RETRY_SECONDS = 300.0

# How long what was thrown away stays intact for readers who hold it open without a lease.
TRASH_SECONDS = 300.0

# Seconds that a doctor waits for the one on the other node.
DOCTOR_TIMEOUT = 60.0

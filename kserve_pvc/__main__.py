"""
`python -m kserve_pvc`.
"""

import sys

from kserve_pvc._cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""python -m pyro_cryo.cli"""

import sys

from pyro_cryo.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m hpctrain` is the command line."""

import sys

from hpctrain.cli import main

sys.exit(main())

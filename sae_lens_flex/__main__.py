"""The command line, as `python -m sae_lens_flex`."""

import sys

from .cli import main

sys.exit(main())

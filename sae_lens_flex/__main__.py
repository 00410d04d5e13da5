"""`python -m sae_lens_flex`: the command line."""

import sys

from .cli import main

sys.exit(main())

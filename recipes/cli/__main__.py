"""``python -m trimtab.recipes.cli``, as launchers call the command."""

import sys

from trimtab.recipes.cli import main

sys.exit(main())

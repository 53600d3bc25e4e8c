"""`python -m planner.cli`: the command without its installed script."""

import sys

from planner.cli.main import main

sys.exit(main())

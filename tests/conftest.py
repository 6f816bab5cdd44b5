"""The same examples in each run: a test that fails, fails for whoever looks at it next.

`HYPOTHESIS_PROFILE=explore make test` draws new ones. No example has to be quick: the machine may
be busy.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

ANY_SPEED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", ANY_SPEED, derandomize=True)
settings.register_profile("explore", ANY_SPEED, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

"""How many cases the property tests try: few in every run, many with HYPOTHESIS_PROFILE=fuzz."""

import os

from hypothesis import HealthCheck, settings

SHARED = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("quick", max_examples=15, derandomize=True, **SHARED)
settings.register_profile("fuzz", max_examples=300, **SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def times(factor: int) -> settings:
    """Return the profile with so many times its cases, for properties that are cheap to try."""
    return settings(max_examples=factor * settings.default.max_examples)

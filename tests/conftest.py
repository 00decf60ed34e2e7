"""Shared by every room's tests: one hypothesis profile, no wall-clock flakiness."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "headrace", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], derandomize=True
)
settings.load_profile("headrace")

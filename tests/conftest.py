"""Settings that must be there before ray is imported, and the Ray that all tests share."""

from __future__ import annotations

from orchestrator.executors.ray_env import prepare_environment, remove_dead_sessions

_TEMP = prepare_environment()

import os  # noqa: E402
import sys  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from orchestrator.store import Store  # noqa: E402

# A machine that stands still for some seconds is no fault of a property.
settings.register_profile("moepipe", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moepipe")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Each test begins alike, whatever ran before it here: own draws, the one thread of our environment, no tracking.

    An executor in this process leaves its task's threads behind: with more of them sums come out otherwise, and on a
    busy machine small operations take twenty times as long.
    """
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow writes there what it was used with last
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.default_generator.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    """Its own draws do not depend either on the fixtures, of which the first test that wants them makes some."""
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(1)


@pytest.fixture(scope="session")
def ray_local():
    """One embedded Ray of four logical CPUs for the whole session; keep apart by names, never by restarting."""
    import ray

    if not ray.is_initialized():
        remove_dead_sessions(_TEMP)
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(_TEMP),
        )
    yield ray
    ray.shutdown()


@pytest.fixture
def store(tmp_path):
    """An empty store in a folder."""
    return Store.open(tmp_path / "store")

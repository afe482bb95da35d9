"""Settings that must be there before ray is imported, and the Ray that all tests share."""

from __future__ import annotations

from orchestrator.executors.ray_env import prepare_environment, remove_dead_sessions

_TEMP = prepare_environment()

import pytest  # noqa: E402

from orchestrator.store import Store  # noqa: E402


@pytest.fixture(scope="session")
def ray_local():
    """One embedded Ray of four logical CPUs for the whole session; keep apart by names, never by restarting."""
    import ray

    if not ray.is_initialized():
        remove_dead_sessions(_TEMP)
        ray.init(
            address="local",
            num_cpus=4,
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

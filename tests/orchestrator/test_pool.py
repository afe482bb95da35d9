from orchestrator.capacity import Capacity
from orchestrator.executors.pool import Pool, Runner

ONE = Capacity(({"cpus": 4.0, "gpus": 1.0},))


def pool_of(*shapes):
    ended = []
    pool = Pool(lambda runner: ended.append(runner.actor))
    for name, holds in shapes:
        pool.give(Runner(name, holds))
    return pool, ended


def test_an_actor_is_used_again_for_its_own_shape():
    pool, _ = pool_of(("a", {"cpus": 1.0}), ("b", {"cpus": 2.0}), ("c", {"cpus": 1.0}))
    assert pool.take({"cpus": 1.0}).actor == "c" and pool.take({"cpus": 1.0}).actor == "a"
    assert pool.take({"cpus": 1.0}) is None and len(pool) == 1


def test_only_as_many_go_as_are_in_the_way():
    pool, ended = pool_of(("a", {"cpus": 1.0}), ("g", {"gpus": 1.0}), ("b", {"cpus": 1.0}), ("c", {"cpus": 1.0}))
    pool.make_room({"cpus": 1.0}, [], ONE)
    assert ended == []
    pool.make_room({"cpus": 2.0}, [{"cpus": 1.0}], ONE)
    assert ended == ["a", "b"] and len(pool) == 2


def test_over_several_machines_all_rivals_go():
    pool, ended = pool_of(("a", {"cpus": 1.0}), ("g", {"gpus": 1.0}), ("b", {"cpus": 1.0}))
    pool.make_room({"cpus": 1.0}, [], Capacity(({"cpus": 8.0}, {"cpus": 8.0})))
    assert ended == ["a", "b"]


def test_clear():
    pool, ended = pool_of(("a", {}), ("b", {}))
    pool.clear()
    assert ended == ["a", "b"] and len(pool) == 0
    pool.give(Runner("c", {}))
    pool.clear(end=False)
    assert ended == ["a", "b"] and pool.take({}) is None


def test_a_gang_is_kept_for_its_own_shape_and_not_for_ever():
    pool, ended = pool_of(("a", {}))
    pool.give(Runner("g", {"cpus": 2.0}, gang=True))
    assert pool.take({"cpus": 2.0}) is None
    assert pool.take({"cpus": 4.0}, gang=True) is None
    gang = pool.take({"cpus": 2.0}, gang=True)
    assert gang.actor == "g"
    pool.give(gang)
    pool.end_idle_gangs(3600.0)
    assert ended == []
    pool.end_idle_gangs(0.0)
    assert ended == ["g"] and pool.take({}).actor == "a"

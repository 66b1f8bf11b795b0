"""The live part of ``eopd check``: the teachers of a run are started alone, and tested."""

import asyncio

from eopd.config import Config
from eopd.preflight import Prepared
from eopd.runtime import cluster
from eopd.runtime.placement import plan_teacher
from eopd.runtime.supervisor import teachers
from eopd.runtime.teachers import self_test_replicas
from eopd.teacher.selftest import SelfTestReport


def check_live(config: Config, prepared: Prepared) -> list[SelfTestReport]:
    """Starts every replica of every teacher on the run's cluster, tests them, and stops them.

    Raises:
        ConfigError: the cluster is too small.
        StartError: a replica did not start.
        TeacherSelfTestError: a teacher's answers are not possible, or its replicas differ.
    """
    prompt_ids = prepared.train.prompts[0].token_ids

    async def run() -> list[SelfTestReport]:
        async with teachers(config) as fleets:
            return await self_test_replicas(config, fleets, prompt_ids)

    with cluster.connect(config.cluster):
        cluster.require_room([plan_teacher(teacher) for teacher in config.teachers], config.cluster)
        return asyncio.run(run())

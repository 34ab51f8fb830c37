"""What a front finds when it starts: the jobs and the files of an earlier one."""

from __future__ import annotations

import logging
from pathlib import Path

import anyio.to_thread

from halovae.serving import results
from halovae.serving.jobs import REQUEUED, interrupted
from halovae.serving.settings import RankSettings
from halovae.serving.store import JobStore
from halovae.serving.table import JobTable

log = logging.getLogger(__name__)
_PATIENCE = 60.0  # seconds for which a start waits for another process that writes to the database


async def recover(jobs: JobStore, ranks: RankSettings, inputs: Path, planned: Path) -> None:
    """Take over results that the database does not know, queue interrupted jobs, and remove what nobody needs.

    Args:
        jobs: the jobs on disk.
        ranks: the ranks' settings.
        inputs: the folder of input pictures.
        planned: a file that exists if the earlier front was asked to end.
    """
    inputs.mkdir(mode=0o700, exist_ok=True)
    await anyio.to_thread.run_sync(results.prepare, ranks.results)
    adopted = await jobs.write_patiently(_PATIENCE, JobTable.adopt, [*results.noted(ranks.results)])
    if adopted:
        log.warning("%d result(s) that the database did not know were taken over", adopted)
    for job in await jobs.read(JobTable.of, "queued", "in_progress"):
        if job.kind == "image" and job.request is None:  # nobody waits for it, and nobody can come back for it
            await jobs.write_patiently(_PATIENCE, JobTable.delete, job.id)
    running = await jobs.read(JobTable.of, "in_progress")
    for job in running:
        changes = REQUEUED if planned.exists() else interrupted(job, "front", len(running) == 1)
        await jobs.write_patiently(_PATIENCE, JobTable.update, job, **changes)
    planned.unlink(missing_ok=True)
    completed = await jobs.read(JobTable.of, "completed")
    await anyio.to_thread.run_sync(results.adopt, ranks.output, ranks.results, completed)
    waiting = await jobs.read(JobTable.unended)
    await anyio.to_thread.run_sync(results.drop_orphans, inputs, waiting)

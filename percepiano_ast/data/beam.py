"""The same shards, made by an Apache Beam pipeline: on this machine, on Dataflow, Flink or Spark.

A shard is made whole by one worker, from the same functions as here, and brought to its place: a directory that all workers
share, or ``gs://``. TFDS's own Beam writer is not used: its ArrayRecord files can only be local, it forgets all when
it is interrupted, and where an example goes depends on how many there are.

Apache Beam is an extra, ``pip install "percepiano_ast[beam]"``; on Colab it would move packages that are loaded already.
"""

from collections.abc import Callable

from percepiano_ast.config import InputError, RunFailed
from percepiano_ast.data.shards import Shard
from percepiano_ast.data.staging import Job


def run(job: Job, plan: list[Shard], runner: str, options: tuple[str, ...], log: Callable[[str], None]) -> dict[str, str]:
    """Make the shards that are not there, or that lack recordings; returns bad recordings with their reasons.

    Args:
        options: of the pipeline, such as ``--project=...``.

    Raises:
        InputError: unknown runner.
        RunFailed: the pipeline failed; the shards that it finished are kept.
    """
    beam, options_of = _beam()
    missing = [shard for shard in plan if (record := job.written(shard)) is None or record["bad"]]
    log(f"  {len(plan) - len(missing)} of {len(plan)} shards were ready already; {runner} makes the others")
    try:
        pipeline = beam.Pipeline(runner=runner, options=options_of(list(options)))
    except (ValueError, ImportError) as error:
        raise InputError(f"cannot start Beam's runner {runner!r}: {error}") from error
    # Without the reshuffle a runner may fuse all shards into one worker's task.
    shards = pipeline | beam.Create(missing) | beam.Reshuffle()
    shards | "Make" >> beam.Map(job.make)
    state = pipeline.run().wait_until_finish()
    if state != "DONE":
        raise RunFailed(f"the pipeline ended in state {state}; run again, it continues")
    records = [job.written(shard) for shard in plan]
    return {key: reason for record in records if record for key, reason in record["bad"].items()}


def _beam():
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError(
            'Apache Beam is not installed. Run `pip install "percepiano_ast[beam]"` in an environment of its own, '
            "or leave --beam-runner out: this machine's processes make the same shards"
        ) from error
    return apache_beam, PipelineOptions

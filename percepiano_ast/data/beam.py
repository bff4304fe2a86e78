"""Write the same shards with an Apache Beam pipeline: on this machine, Dataflow, Flink or Spark.

One worker makes a complete shard with the same functions as `staging` and copies it to a shared
directory or ``gs://``. TFDS's own Beam writer is not used: its ArrayRecord files can only be local,
it cannot resume, and the position of an example depends on the number of examples.

Apache Beam is an extra, ``pip install "percepiano_ast[beam]"``; on Colab it would change the
versions of loaded packages.
"""

from collections.abc import Callable

from percepiano_ast.data.shards import Shard
from percepiano_ast.data.staging import Job
from percepiano_ast.errors import InputError, RunFailed


def run(
    job: Job, plan: list[Shard], runner: str, options: tuple[str, ...], log: Callable[[str], None]
) -> dict[str, str]:
    """Make shards that are missing or lack recordings; returns unusable recordings with their
    reasons.

    Args:
        options: pipeline options, such as ``--project=...``.

    Raises:
        InputError: unknown runner.
        RunFailed: the pipeline failed; finished shards are kept.
    """
    beam, options_of = _beam()
    missing = [shard for shard in plan if (record := job.written(shard)) is None or record["bad"]]
    log(
        f"  {len(plan) - len(missing)} of {len(plan)} shards are complete; {runner} makes the"
        " others"
    )
    try:
        pipeline = beam.Pipeline(runner=runner, options=options_of(list(options)))
    except (ValueError, ImportError) as error:
        raise InputError(
            f"cannot start Beam's runner {runner!r}: {error}. Check --beam-runner and its options."
        ) from error
    # Without the reshuffle a runner may fuse all shards into one task of one worker.
    shards = pipeline | beam.Create(missing) | beam.Reshuffle()
    shards | "Make" >> beam.Map(job.make)
    state = pipeline.run().wait_until_finish()
    if state != "DONE":
        raise RunFailed(f"the pipeline ended in state {state}. Run again to resume.")
    records = [job.written(shard) for shard in plan]
    return {key: reason for record in records if record for key, reason in record["bad"].items()}


def _beam():
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError(
            'Apache Beam is not installed. Run `pip install "percepiano_ast[beam]"` in a separate'
            " environment, or omit --beam-runner: local processes make the same shards."
        ) from error
    return apache_beam, PipelineOptions

"""The four steps of the suite, as called by notebooks and command line. Each step reads the output
of the previous one.

Below a run's root: ``maestro/`` (shards), ``pretrain/<pretraining>/``, ``percepiano/`` (shards;
``percepiano_kaldi/`` with the papers' front end), ``finetune/<model>/fold_<k>/``,
``predictions_<model>.csv`` and ``evaluation/``; for custom ratings the same below ``own/<name>/``.
Every step can be resumed, and none overwrites the output of another configuration.
"""

from percepiano_ast.data.build import Work
from percepiano_ast.suite.curve import learning_curve
from percepiano_ast.suite.hearing import maestro_source, preprocess_maestro, pretrain
from percepiano_ast.suite.judged import judge
from percepiano_ast.suite.own import OwnResult, few_shot, finetune_own, own_runs, own_source
from percepiano_ast.suite.packaging import package
from percepiano_ast.suite.rating import (
    baselines,
    ceiling_of,
    evaluate,
    finetune,
    percepiano_source,
    preprocess_percepiano,
)
from percepiano_ast.suite.run import (
    INITS,
    MADE_BY_FINETUNE,
    MADE_BY_PRETRAIN,
    Run,
    Start,
    hears_notes,
    init_named,
    start_of,
    workers,
)
from percepiano_ast.suite.study import study, study_trained

__all__ = [
    "INITS",
    "MADE_BY_FINETUNE",
    "MADE_BY_PRETRAIN",
    "OwnResult",
    "Run",
    "Start",
    "Work",
    "baselines",
    "ceiling_of",
    "evaluate",
    "few_shot",
    "hears_notes",
    "finetune",
    "finetune_own",
    "init_named",
    "judge",
    "learning_curve",
    "maestro_source",
    "own_runs",
    "own_source",
    "package",
    "percepiano_source",
    "preprocess_maestro",
    "preprocess_percepiano",
    "pretrain",
    "start_of",
    "study",
    "study_trained",
    "workers",
]

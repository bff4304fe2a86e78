"""The steps of the product, as called by notebooks and command line. Each step reads the output of
the previous one.

Below a run's root: ``maestro/`` (shards), ``pretrain/<pretraining>/``, ``percepiano/`` (shards;
``percepiano_kaldi/`` with the papers' front end), ``finetune/<model>/fold_<k>/``,
``predictions_<model>.csv`` and ``evaluation/``; for custom ratings the same below ``own/<name>/``.
Every step can be resumed, and none overwrites the output of another configuration.
"""

# ruff: noqa: F401

from percepiano_ast.data.build import BuildOptions
from percepiano_ast.pipeline.ablate import ablate_heads, ablate_training
from percepiano_ast.pipeline.few_shot import (
    custom_runs,
    custom_source,
    few_shot_run,
    finetune_custom,
)
from percepiano_ast.pipeline.package import package_model
from percepiano_ast.pipeline.regress import fit_regressors, learning_curve
from percepiano_ast.pipeline.run import (
    INITS,
    MADE_BY_FINETUNE,
    MADE_BY_PRETRAIN,
    Run,
    init_named,
    transcribes,
    workers,
)
from percepiano_ast.pipeline.steps import (
    ceiling_of,
    evaluate,
    finetune,
    maestro_source,
    percepiano_source,
    predict_baselines,
    preprocess_maestro,
    preprocess_percepiano,
    pretrain,
)

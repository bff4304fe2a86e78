"""Baselines without learned audio features. Their predictions have the same format as those of the
models.

========================
=============================================================================================
``identity-segment``      no audio: the mean of the other clips of the passage
``identity-segment-deadpan``  the same, plus human versus deadpan (additive) ``identity-player``
no audio: the mean of the player's other clips ``identity-additive``     no audio: passage and
player, additive ``audio-stats``           statistics of the sound (`audio.audio_features`): the
mean of ridge, kernel ridge and trees,
                          which are also separate models, ``audio-stats-ridge``, ``-kernel`` and
                          ``-extratrees``
``midi-stats``            the same regressors on MIDI descriptors (`performance_features`); not an
audio model ``midi-stats+score``      ``midi-stats`` plus score features (`score_features`); not an
audio model, score-informed ``mlp``                   a feed-forward network on the statistics of
the sound, for all dimensions ``mlp-single``            the same network, one for each dimension
========================
=============================================================================================

`run.run` runs all baselines; `identity`, `statistics` and `models.baselines` predict, `features`
caches the input features.
"""

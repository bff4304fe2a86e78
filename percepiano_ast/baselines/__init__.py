"""Baselines that learn no hearing: the floor of every table of results, written as predictions like everything else.

========================  =============================================================================================
``identity-segment``      hears nothing: the mean of the other clips of the passage
``identity-segment-deadpan``  the same, and whether a person played (additive)
``identity-player``       the mean of the other clips of the player
``identity-additive``     passage and player, additive
``audio-stats``           statistics of the sound (`audio.classic_features`): the mean of ridge, kernel ridge and trees,
                          which are there by themselves as ``audio-stats-ridge``, ``-kernel`` and ``-extratrees``
``midi-stats``            the same of the MIDI (`descriptors.describe`); not an audio model
``midi-stats+score``      the same with the score (`score.features`): it sees what is written, no audio model either
``mlp``                   a feed-forward network on the statistics of the sound, all dimensions together
``mlp-single``            the same network, one for each dimension
========================  =============================================================================================

`run.run` is the whole; `identity`, `statistics` and `models.baselines` predict, `features` keeps what is heard.
"""

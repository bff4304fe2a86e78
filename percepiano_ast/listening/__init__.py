"""Sensitivity test: real performances with one change each, rendered and rated by any model.

``run.listen`` runs the test; ``raters.Rate`` is the interface of a rating function;
`music.synth` caches the audio. The changes are in `music.edits` (of the playing) and
`audio.effects` (of the recording), the tables in `evaluation.analysis`.
"""

"""Listening tests by construction: real performances with one thing changed, rendered, and rated by any model.

``run.listen`` is the whole; ``raters.Rate`` is what a rating function has to offer; `data.renderings` keeps the sound.
The changes are in `variations` (of the playing) and `audio.conditions` (of the recording), the tables in
`evaluation.listening`.
"""

"""Text of a report: descriptions of protocols, headlines, comparisons and number formats."""

import numpy as np
import pandas as pd

from percepiano_ast.evaluation import compare

# What each protocol holds out. In the leaky ones the music of a held-out clip is also in training.
PROTOCOLS = {
    "content": "content groups are held out: training and evaluation share no music (primary)",
    "segment": (
        "**leaky**: segments are held out, but longer segments contain shorter ones and passages"
        " repeat"
    ),
    "performer": (
        "players are held out; performances of the same music by other players are in training"
    ),
    "movement": "movements or variation sets are held out",
    "composition": "compositions are held out",
    "random": (
        "**leaky**: clips are held out at random; performances of the same music by other players"
        " are in training"
    ),
    "upstream_piece": (
        "**leaky** and partial by design: the validation folds of the PercePiano paper's piece"
        " split"
    ),
    "upstream_performer": (
        "partial by design: the validation folds of the PercePiano paper's performer split"
    ),
    "leave_one_out": (
        "**leaky**: one clip is held out at a time; meant for identity baselines, not for models"
    ),
    "leave_player_out": (
        "**leaky**: all clips of one player of a composition are held out; performances by others"
        " are in training"
    ),
}
SIGNED = "+.3f"  # differences; "-0.000" shows on which side of zero a bound is
# Names of models with further inputs, of ensembles and of identity baselines contain one of these.
_NOT_AUDIO_ALONE = ("midi", "score", "ensemble", "identity")


def leaky(protocol: str) -> str:
    """`` (leaky)`` for a leaky protocol, else nothing."""
    return " (leaky)" if "leaky" in PROTOCOLS.get(protocol, "") else ""


def in_order(protocols) -> list[str]:
    """Protocols in the order of ``PROTOCOLS``, the primary one first; unknown protocols follow by
    name."""
    order = list(PROTOCOLS)
    return sorted(
        set(protocols), key=lambda name: (order.index(name) if name in order else len(order), name)
    )


def is_encoder(model: str) -> bool:
    """Whether the name is that of an audio-only ``ast-*`` model."""
    return model.startswith("ast-") and hears_audio_alone(model)


def hears_audio_alone(model: str) -> bool:
    """Whether the name is that of an audio-only model: without MIDI or score, not an ensemble or
    identity baseline."""
    return not any(word in model for word in _NOT_AUDIO_ALONE)


def sees_score(model: str) -> bool:
    """Whether the name is that of a score-informed model."""
    return "+score" in model


def ranking(values: pd.DataFrame) -> pd.DataFrame:
    """Rows of mean r, overall, by model, best first and NaN last. ``values``: of one protocol."""
    rows = values[
        (values["scope"] == "overall")
        & (values["metric"] == "pearson")
        & (values["dimension"] == "mean")
    ]
    return rows.set_index("model").sort_values("value", ascending=False)


def headlines(values: pd.DataFrame, pairs: pd.DataFrame, protocol: str) -> list[str]:
    """Headlines of one protocol: the best model, and the comparison of the audio encoder with its
    baselines.

    The encoder is the best pre-trained ``ast-*``; its baselines are ``mlp`` and every
    ``ast-*-scratch``.

    Args:
        values, pairs: tables ``summary`` and ``differences`` of `evaluation.evaluate`.
    """
    ranked = ranking(values[values["protocol"] == protocol])
    without = [
        f"The mean Pearson r of `{name}` is undefined: see Warnings."
        for name in ranked.index[ranked["value"].isna()]
    ]
    means = ranked.dropna(subset="value")
    where = f"Under the `{protocol}` protocol{leaky(protocol)}"
    if means.empty:
        return [f"{where}, no model can be ranked.", *without]
    best = means.iloc[0]
    of = f"the best of {len(means)} models" if len(means) > 1 else "the only model"
    first = f"{where}, {of} is `{best.name}` with a mean Pearson r of {ranged(best)}{_of(best)}."
    lines = [first, *without]
    encoders = [name for name in means.index if is_encoder(name)]
    pretrained = [name for name in encoders if not name.endswith("-scratch")]
    if not encoders:
        return [*lines, "No model with an audio encoder (`ast-*`) is ranked."]
    encoder = (pretrained or encoders)[0]
    kind = "a pre-trained" if pretrained else "an"
    lines.append(
        f"The best model with {kind} audio encoder is `{encoder}`: {ranged(means.loc[encoder])}."
    )
    rivals = [name for name in ["mlp", *encoders] if name in means.index and name != encoder]
    rivals = [name for name in rivals if name == "mlp" or name.endswith("-scratch")]
    mean = pairs[
        (pairs["protocol"] == protocol)
        & (pairs["metric"] == "pearson")
        & (pairs["scope"] == "overall")
        & (pairs["dimension"] == "mean")
    ]
    lines += [versus(encoder, rival, mean) for rival in rivals]
    if "mlp" not in means.index:
        lines.append("There is no `mlp` baseline to compare the encoder with.")
    if pretrained and not any(name.endswith("-scratch") for name in encoders):
        lines.append("There is no `ast-*-scratch` model, so the effect of pre-training is unknown.")
    return lines


def versus(model: str, rival: str, pairs: pd.DataFrame) -> str:
    """One sentence on the difference of mean r; "beats" only if the interval excludes zero.

    Args:
        pairs: the rows of mean r, overall, of one protocol, of the table ``differences``.
    """
    rows = compare.between(pairs, model, rival)
    if rows.empty or np.isnan(rows["difference"].iloc[0]):
        return (
            f"`{model}` and `{rival}` cannot be compared: they share no clips or seeds, or r is"
            " undefined."
        )
    row = rows.iloc[0]
    evidence = f"difference: 95 % interval {interval(row, SIGNED)}, p {number(row['p'], 'z.3f')}"
    size = f"{abs(row['difference']):.3f} ({evidence})"
    if row["difference"] <= 0:
        reliable = "excludes" if row["high"] < 0 else "includes"
        return (
            f"`{model}` **does not beat** `{rival}`: its mean r is lower by {size}; the interval"
            f" {reliable} zero."
        )
    if row["low"] > 0:
        return f"`{model}` **beats** `{rival}` by {size}."
    return (
        f"`{model}` **does not reliably beat** `{rival}`: its mean r is higher by {size}; the"
        " interval includes zero."
    )


def _of(row) -> str:
    return f", mean of {row['seeds']} seeds" if row["seeds"] > 1 else ""


def number(value: float, form: str = "z.2f") -> str:
    """A number as text, "n/a" for NaN; ``z`` in ``form`` avoids "-0.00"."""
    return "n/a" if np.isnan(value) else f"{value:{form}}"


def interval(row, form: str = "z.2f") -> str:
    """``[low, high]`` of a row."""
    return "no interval" if np.isnan(row["low"]) else f"[{row['low']:{form}}, {row['high']:{form}}]"


def ranged(row, form: str = "z.2f") -> str:
    """``value [low, high]`` of a row."""
    return number(row["value"], form) + ("" if np.isnan(row["low"]) else f" {interval(row, form)}")

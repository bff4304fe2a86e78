"""Words and numbers of a report: what a protocol holds out, who is ahead of whom, how a number is written."""

import numpy as np
import pandas as pd

from percepiano_ast.evaluation import summary

# What each protocol holds out. In the leaky ones the music of a held-out clip is heard in training.
PROTOCOLS = {
    "content": "whole content groups are held out: no music is shared with training (primary)",
    "segment": "**leaky**: segments are held out, but longer segments contain shorter ones and passages repeat",
    "performer": "players are held out, their music is not: it is heard in training from other players",
    "movement": "whole movements or variation sets are held out",
    "composition": "whole compositions are held out",
    "random": "**leaky**: clips are held out at random; the same music from other players is in training",
    "upstream_piece": "**leaky** and partial by design: the validation folds of the PercePiano paper's piece split",
    "upstream_performer": "partial by design: the validation folds of the PercePiano paper's performer split",
    "leave_one_out": "**leaky**: every clip by itself; what an identity baseline knows, no fair test of a model",
    "leave_player_out": "**leaky**: all clips of one player of a composition; the same music from others is in training",
}
SIGNED = "+.3f"  # differences; "-0.000" tells on which side of zero a bound lies
# Models that see more than the sound, or are several, say so in their names.
_NOT_AUDIO_ALONE = ("midi", "score", "ensemble", "identity")


def leaky(protocol: str) -> str:
    """`` (leaky)`` for a protocol that is."""
    return " (leaky)" if "leaky" in PROTOCOLS.get(protocol, "") else ""


def in_order(protocols) -> list[str]:
    """Protocols in the order of ``PROTOCOLS``, the primary one first; others behind them, by name."""
    order = list(PROTOCOLS)
    return sorted(set(protocols), key=lambda name: (order.index(name) if name in order else len(order), name))


def is_encoder(model: str) -> bool:
    """An ``ast-*`` model that hears audio alone."""
    return model.startswith("ast-") and hears_audio_alone(model)


def hears_audio_alone(model: str) -> bool:
    """By its name: no MIDI, no score, one model, no identity baseline."""
    return not any(word in model for word in _NOT_AUDIO_ALONE)


def sees_score(model: str) -> bool:
    """By its name: it is given what is written beside what is played."""
    return "+score" in model


def ranking(values: pd.DataFrame) -> pd.DataFrame:
    """Rows of mean r, overall, by model, best first; without a value, last. ``values`` of one protocol."""
    rows = values[(values["scope"] == "overall") & (values["metric"] == "pearson") & (values["dimension"] == "mean")]
    return rows.set_index("model").sort_values("value", ascending=False)


def headlines(values: pd.DataFrame, pairs: pd.DataFrame, protocol: str) -> list[str]:
    """What the numbers of one protocol say: the best model; does the audio encoder beat its rivals?

    The encoder is the best pre-trained ``ast-*``; its rivals are ``mlp`` and every ``ast-*-scratch``.

    Args:
        values, pairs: tables ``summary`` and ``differences`` of `evaluation.evaluate`.
    """
    ranked = ranking(values[values["protocol"] == protocol])
    without = [f"`{name}` has no mean Pearson r: see the warnings." for name in ranked.index[ranked["value"].isna()]]
    means = ranked.dropna(subset="value")
    where = f"Under the `{protocol}` protocol{leaky(protocol)}"
    if means.empty:
        return [f"{where} no model can be ranked.", *without]
    best = means.iloc[0]
    of = f"the best of {len(means)} models" if len(means) > 1 else "the only model"
    first = f"{where} {of} is `{best.name}` with a mean Pearson r of {ranged(best)}{_of(best)}."
    lines = [first, *without]
    encoders = [name for name in means.index if is_encoder(name)]
    pretrained = [name for name in encoders if not name.endswith("-scratch")]
    if not encoders:
        return [*lines, "No audio encoder (`ast-*`) is among the ranked models."]
    encoder = (pretrained or encoders)[0]
    lines.append(f"The best {'pre-trained ' if pretrained else ''}audio encoder is `{encoder}`: {ranged(means.loc[encoder])}.")
    rivals = [name for name in ["mlp", *encoders] if name in means.index and name != encoder]
    rivals = [name for name in rivals if name == "mlp" or name.endswith("-scratch")]
    mean = pairs[(pairs["protocol"] == protocol) & (pairs["metric"] == "pearson") & (pairs["scope"] == "overall")
                 & (pairs["dimension"] == "mean")]  # fmt: skip
    lines += [versus(encoder, rival, mean) for rival in rivals]
    if "mlp" not in means.index:
        lines.append("There is no `mlp` baseline to compare it with.")
    if pretrained and not any(name.endswith("-scratch") for name in encoders):
        lines.append("There is no `ast-*-scratch` model: what pre-training is worth is not known.")
    return lines


def versus(model: str, rival: str, pairs: pd.DataFrame) -> str:
    """One sentence on the difference of mean r; "beats" only where the interval leaves out zero.

    Args:
        pairs: the rows of mean r, overall, of one protocol, of the table ``differences``.
    """
    rows = summary.between(pairs, model, rival)
    if rows.empty or np.isnan(rows["difference"].iloc[0]):
        return f"`{model}` and `{rival}` cannot be compared: no common clips or seeds, or r is undefined."
    row = rows.iloc[0]
    evidence = f"difference: 95 % interval {interval(row, SIGNED)}, p {number(row['p'], 'z.3f')}"
    size = f"{abs(row['difference']):.3f} ({evidence})"
    if row["difference"] <= 0:
        reliable = ", reliably so" if row["high"] < 0 else ", within the noise"
        return f"`{model}` **does not beat** `{rival}`: it is behind by {size}{reliable}."
    if row["low"] > 0:
        return f"`{model}` **beats** `{rival}` by {size}."
    return f"`{model}` **does not reliably beat** `{rival}`: it is ahead by {size}, within the noise."


def _of(row) -> str:
    return f", mean of {row['seeds']} seeds" if row["seeds"] > 1 else ""


def number(value: float, form: str = "z.2f") -> str:
    """A number in words; ``z`` writes no "-0.00"."""
    return "n/a" if np.isnan(value) else f"{value:{form}}"


def interval(row, form: str = "z.2f") -> str:
    """``[low, high]`` of a row."""
    return "no interval" if np.isnan(row["low"]) else f"[{row['low']:{form}}, {row['high']:{form}}]"


def ranged(row, form: str = "z.2f") -> str:
    """``value [low, high]`` of a row."""
    return number(row["value"], form) + ("" if np.isnan(row["low"]) else f" {interval(row, form)}")

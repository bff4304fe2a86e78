"""Published results of other systems on PercePiano, as reported; not reproduced here."""

from importlib import resources

import pandas as pd


def published_results() -> pd.DataFrame:
    """One row per published result: `system,source,hears,protocol,nearest,metric,value,why_not`.

    `hears` is the input of the system, ``nearest`` the most similar protocol of this package,
    ``why_not`` the reason why the two are not comparable. Values are means over the 19 dimensions,
    copied from the named sources.
    """
    return pd.read_csv(resources.files("percepiano_ast") / "data" / "published_results.csv")

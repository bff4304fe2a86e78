"""What others report on PercePiano, as they report it; none of it was measured here."""

from importlib import resources

import pandas as pd


def published_results() -> pd.DataFrame:
    """A row a published figure: ``system,source,hears,protocol,nearest,metric,value,why_not``.

    ``nearest`` is the protocol of ours that is most like theirs, ``why_not`` what stands against comparing the two. Values
    are means over the 19 dimensions, copied from the sources named.
    """
    return pd.read_csv(resources.files("percepiano_ast") / "data" / "published_results.csv")

"""How good are the ratings: tables in, tables out. No model and no audio is touched here."""

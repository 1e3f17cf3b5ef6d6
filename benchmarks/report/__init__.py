"""From the JSON of a run to a page, plots and verdicts on the targets."""

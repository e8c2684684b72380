"""Studies: run arms over seeds and datasets, compare them with statistics, and report."""

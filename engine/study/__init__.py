"""Studies: arms of training scripts over seeds and datasets, run to their end, compared with statistics, reported."""

"""A checkpoint as a ready model: loading, predicting, thresholds, references, sharing."""

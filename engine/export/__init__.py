"""Export a model as one file that runs without this repository."""

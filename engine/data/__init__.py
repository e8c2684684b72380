"""From a dataset's name to records, prompts and batches."""

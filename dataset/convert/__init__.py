"""Convert images of other layouts to MVTec's layout: `python -m dataset.convert`."""

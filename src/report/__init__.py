"""Reports: an order's accuracy matrix and its measures, and methods side by side."""

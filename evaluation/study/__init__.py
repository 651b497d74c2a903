"""`cud study`: many runs, compared where they have kept equally much."""

"""`cud evaluate` and `cud import`."""

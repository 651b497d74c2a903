"""What a run of `CUDTrainer` is made of: what it is given, what it plans, records, keeps and says."""

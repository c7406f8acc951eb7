"""What the stages of a run share: models, datasets, files, record, checkpoints."""

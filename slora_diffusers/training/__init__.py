"""What the recipes in train_scripts/ share: data, objectives, optimizers, the loop, checkpoints, validation."""

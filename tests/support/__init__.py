"""What the tests share: models and loops to train, devices, compiled programs."""

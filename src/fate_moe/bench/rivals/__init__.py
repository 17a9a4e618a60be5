"""Programs that run the same model, each measured in its own process; one file a program."""

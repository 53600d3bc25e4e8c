"""The command `checkpoint-planner`; the only place of the packages that prints."""

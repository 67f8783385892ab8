"""Where memory goes, before and while a model runs."""

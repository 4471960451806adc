"""The only way in and out for models of other tools."""
